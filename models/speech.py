"""Sound to the features that a Whisper model is fed, and what its decoder begins with and never writes.

As transformers' `generate` has it: a transcription begins with a start, a language and a task where the model has
several, and a mark that no timestamps follow; some tokens are suppressed, and some at the beginning.
Source: https://huggingface.co/docs/transformers (Whisper, generation_whisper.py)
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimize.models.encoding import Row, load_tokenizer
from optimize.models.tasks import Examples, read_json
from optimize.pipeline.batches import NEW, SOUND, Encoded
from optimize.pipeline.errors import CheckpointError, RequestError
from optimize.pipeline.questions import ENDS, TRUTH

DRAWN = 12  # sounds that are judged where nobody gives any
WRITTEN = 128  # tokens of a transcription, at most
NEVER = np.float32(-1e4)  # in place of a logit: finite, and no probability in float32


FIRST, LATER = slice(None), slice(0, 0)  # rows of logits that are of first tokens: all, none


@dataclass(frozen=True)
class Decoding:
    """What a transcription's tokens have to keep to."""

    prompt: tuple[int, ...]  # what every one begins with
    end: int
    never: tuple[int, ...] = ()
    never_first: tuple[int, ...] = ()

    def allowed(self, logits: NDArray[Any], first: slice) -> NDArray[Any]:
        """Logits of [rows, vocabulary] with what is suppressed out of reach; `first` are the rows of first tokens."""
        logits[:, list(self.never)] = NEVER
        logits[first, list(self.never_first)] = NEVER
        return logits


def read_decoding(folder: Path) -> Decoding:
    """Of a checkpoint's configuration. Several languages: that of generation_config.json, or English."""
    settings = read_json(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        settings |= read_json(folder / "generation_config.json")
    prompt = [settings["decoder_start_token_id"]]
    if settings.get("lang_to_id"):
        language = settings.get("language") or "en"
        known = {code.strip("<|>"): token for code, token in settings["lang_to_id"].items()}
        if language.strip("<|>") not in known:
            raise CheckpointError(f"{folder}: no language {language!r}", hint=f"one of {', '.join(known)}")
        prompt += [known[language.strip("<|>")], settings["task_to_id"][settings.get("task") or "transcribe"]]
    else:
        prompt += [token for _, token in settings.get("forced_decoder_ids") or ()]
    silent = settings.get("no_timestamps_token_id")
    return Decoding(
        tuple([*prompt, silent] if silent is not None and silent not in prompt else prompt),
        settings["eos_token_id"],
        tuple(settings.get("suppress_tokens") or ()),
        tuple(settings.get("begin_suppress_tokens") or ()),
    )


def encode_all(folder: Path, asked: Examples) -> dict[str, list[Encoded]]:
    """See tasks.Encoder: each clip is a batch by itself, float32 of [mels, frames], transcribed to its end; a cell is
    [batch, mels, frames]. Raises RequestError for what is no sound, or longer than the model hears.
    """
    decoding, normalize = read_decoding(folder), normalizer(folder)
    room = min(WRITTEN, asked.max_length - len(decoding.prompt))
    clips = _features(folder, asked.evaluation)
    batches: list[Encoded] = [{SOUND: clip, ENDS: np.array([decoding.end]), NEW: np.array(room)} for clip in clips]
    if asked.labelled:
        for batch, row in zip(batches, asked.evaluation, strict=True):
            batch[TRUTH] = np.array(normalize(row["transcript"]), dtype=np.str_)
    stacked = np.stack(clips)
    sizes = [(stacked[np.arange(cell.batch) % len(clips)], cell.new) for cell in asked.cells]
    return {"evaluation": batches, "cells": [{SOUND: sounds, NEW: np.array(new)} for sounds, new in sizes]}


def encode_sample(folder: Path) -> Encoded:
    """See tasks.Encoder."""
    return {SOUND: np.stack(_features(folder, [{"audio": {"drawn": index}} for index in range(2)]))}


def normalizer(folder: Path) -> Any:
    """Whisper's own: what words are before their errors are counted."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    tokenizer = load_tokenizer(folder)
    spelling = getattr(tokenizer, "english_spelling_normalizer", None) or {}
    settings = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    english = not settings.get("lang_to_id") or (settings.get("language") or "en").strip("<|>") in ("en", "english")
    return EnglishTextNormalizer(spelling) if english else BasicTextNormalizer()


@functools.cache
def text_reader(folder: Path) -> Callable[[Sequence[int]], str]:
    """What a transcription's tokens say, normalized."""
    tokenizer, normalize = load_tokenizer(folder), normalizer(folder)
    return lambda tokens: str(normalize(tokenizer.decode(tokens, skip_special_tokens=True)))


def _features(folder: Path, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
    from transformers import AutoFeatureExtractor

    extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    rate, most = extractor.sampling_rate, extractor.n_samples
    found = []
    for row in rows:
        sound = read_sound(row["audio"], rate)
        if len(sound) > most:
            raise RequestError(
                f"{row['audio']['where']}: audio takes {len(sound) / rate:.1f} s, the model hears {most / rate:g}",
                hint="cut it into shorter clips",
            )
        features = extractor(sound, sampling_rate=rate, return_tensors="np")[SOUND]
        found.append(np.asarray(features[0], dtype=np.float32))
    return found


def read_sound(source: Mapping[str, Any], rate: int) -> NDArray[np.float32]:
    """Samples of what a row names, a file (see cells.read_file) or a drawing: one channel, resampled to `rate`.

    Raises RequestError for what is no sound.
    """
    import soundfile
    from scipy.signal import resample_poly

    if "drawn" in source:
        return draw(source["drawn"], rate)
    content = Path(source["path"]).read_bytes()
    try:
        samples, own = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
        raise RequestError(
            f"{source['where']}: audio cannot be read: {error}", hint="save it as .wav or .flac"
        ) from None
    if hashlib.sha256(content).hexdigest() != source["sha256"]:
        raise RequestError(f"{source['where']}: audio was changed while the run was going on", hint="run it again")
    if not len(samples) or not np.isfinite(samples).all():
        raise RequestError(
            f"{source['where']}: audio has {'no samples' if not len(samples) else 'values that are NaN'}"
        )
    mono = samples.mean(axis=1)
    divisor = int(np.gcd(own, rate))
    resampled = mono if own == rate else resample_poly(mono, rate // divisor, own // divisor)
    return np.asarray(resampled, dtype=np.float32)


def draw(index: int, rate: int) -> NDArray[np.float32]:
    """The drawn sound of that number, the same one every time: syllables of a buzzing voice through two resonances,
    pauses and noise. No speech.
    """
    random = np.random.default_rng(index)
    time = np.arange(int(rate * random.uniform(1.5, 6))) / rate
    pitch = random.uniform(90, 240) * (1 + 0.1 * np.sin(2 * np.pi * random.uniform(0.3, 2) * time))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    low, high = (random.uniform(*ends) for ends in ((300, 900), (1000, 2600)))
    harmonics = range(1, 24)
    strength = [sum(np.exp(-(((n * pitch.mean() - peak) / 180) ** 2)) for peak in (low, high)) for n in harmonics]
    voice = np.sum([weight * np.sin(n * phase) for n, weight in zip(harmonics, strength, strict=True)], axis=0)
    syllables = np.clip(np.sin(2 * np.pi * random.uniform(2, 5) * time), 0, 1) ** 0.5
    sound = voice * syllables + random.uniform(0.001, 0.05) * random.standard_normal(len(time))
    return np.asarray(0.3 * sound / max(float(np.abs(sound).max()), 1e-6), dtype=np.float32)
