"""Speech models: sounds that are read or drawn, transcriptions as transformers writes them, and whole runs."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from optimize.models.cells import read_sound as read_cell
from optimize.models.examples import read_examples
from optimize.models.speech import DRAWN, draw, encode_all, read_decoding, read_sound
from optimize.models.tasks import TASKS, Examples
from optimize.pipeline.contract import Cell, Kind
from optimize.pipeline.errors import CheckpointError, RequestError
from optimize.pipeline.questions import ENDS, TRUTH, word_accuracy
from optimize.targets.runtimes.generating import write_until
from tests.conftest import Cli, MakeCheckpoint
from tests.models.test_examples import write

TASK = TASKS["automatic-speech-recognition"]
QUICK = ("--workload", "1+4,2+4", "--budget", "1s", "--min-speedup", "0.0001", "--max-load", "1")
WORDS = ("harbour", "rain", "stone", "quick", "letter", "green", "seven", "song")


@pytest.fixture(scope="module")
def whisper(make_speech_model: MakeCheckpoint) -> Path:
    return make_speech_model()


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips and what is said to be said in them, as a .jsonl file beside a folder of .wav files."""
    folder = tmp_path_factory.mktemp("sounds")
    rows = []
    for index in range(12):
        soundfile.write(folder / f"{index}.wav", draw(index, 8000), 8000)
        rows.append({"audio": f"{index}.wav", "text": " ".join(np.random.default_rng(index).permutation(WORDS)[:3])})
    return Path(write(folder / "data.jsonl", rows))


def cell(folder: Path, samples: Any, rate: int, name: str = "a.wav") -> Mapping[str, Any]:
    """What planning makes of a cell that names such a file."""
    soundfile.write(folder / name, samples, rate)
    return read_cell(str(folder / name), "audio", "--data d.jsonl: row 1")


# Sounds


def test_any_rate_and_channels_become_one_at_the_models_rate(tmp_path: Path) -> None:
    time = np.arange(8000) / 8000
    tone = np.sin(2 * np.pi * 440 * time)
    found = read_sound(cell(tmp_path, np.stack([tone, tone], axis=1), 8000, "a.flac"), 16000)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert found.shape == (16000,) and np.abs(found - expected)[100:-100].max() < 0.01


def test_samples_in_a_row_are_a_sound(tmp_path: Path) -> None:
    samples = np.linspace(-1, 1, 800, dtype=np.float32)
    found = read_cell({"array": samples.tolist(), "sampling_rate": 16000}, "audio", "row 1")
    (tmp_path / "a").write_bytes(found["bytes"])
    assert np.array_equal(read_sound({**found, "path": str(tmp_path / "a")}, 16000), samples)


def test_a_parquet_file_of_sounds_is_not_decoded(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", draw(0, 16000), 16000)
    content = (tmp_path / "a.wav").read_bytes()
    rows = [{"audio": {"bytes": content + bytes([index]), "path": None}, "sentence": "a"} for index in range(9)]
    write(tmp_path / "d.parquet", rows)
    found = read_examples(str(tmp_path / "d.parquet"), TASK)
    assert len(found.evaluation) == 9 and not found.calibration
    assert found.evaluation[0]["audio"]["bytes"] == content + bytes([0]) and found.labels == (("a",),) * 9


@pytest.mark.parametrize(
    ("value", "message"),
    [({"array": ["loud"], "sampling_rate": 16000}, "no sound"), ({"array": [0.0]}, "no sound"), (None, "is empty")],
)
def test_what_is_no_sound_is_refused_while_planning(value: object, message: str) -> None:
    with pytest.raises(RequestError, match=rf"row 1: audio .*{message}"):
        read_cell(value, "audio", "row 1")


def test_a_file_that_is_no_sound_is_refused_by_its_row(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"no sound")
    source = read_cell(str(tmp_path / "a.wav"), "audio", "--data d.jsonl: row 1")
    with pytest.raises(RequestError, match=r"d.jsonl: row 1: audio cannot be read"):
        read_sound(source, 16000)


def test_a_clip_that_is_too_long_is_refused(whisper: Path, tmp_path: Path) -> None:
    source = cell(tmp_path, np.zeros(16000 * 7), 16000)
    with pytest.raises(RequestError, match=r"row 1: audio takes 7.0 s, the model hears 6"):
        encode_all(whisper, Examples([{"audio": source}], max_length=44))


def test_without_data_sounds_are_drawn() -> None:
    found = read_examples(None, TASK)
    assert len(found.evaluation) == DRAWN and not found.calibration and "no speech" in found.source
    assert np.array_equal(draw(0, 16000), draw(0, 16000)) and np.abs(draw(1, 16000)).max() <= 0.31


# Decoding


def test_features_are_the_extractors_and_truths_are_normalized(whisper: Path, sounds: Path) -> None:
    from transformers import AutoFeatureExtractor

    found = read_examples(str(sounds), TASK)
    rows = [{**found.evaluation[0], "transcript": "It's TWENTY-one, Mr. Green!"}]
    encoded = encode_all(whisper, Examples(rows, cells=[Cell(3, new=4)], max_length=44, labelled=True))
    (clip,) = encoded["evaluation"]
    extractor = AutoFeatureExtractor.from_pretrained(whisper)
    sound = read_sound(found.evaluation[0]["audio"], 16000)
    expected = extractor(sound, sampling_rate=16000, return_tensors="np")["input_features"]
    assert np.array_equal(clip["input_features"], expected[0]) and clip[ENDS].tolist() == [2]
    assert str(clip[TRUTH]) == "it is 21 mister green"
    assert encoded["cells"][0]["input_features"].shape == (3, 16, 600)


def test_a_transcription_begins_as_its_checkpoint_says(make_speech_model: MakeCheckpoint) -> None:
    assert read_decoding(make_speech_model()).prompt == (1, 5)
    several = {"lang_to_id": {"<|en|>": 10, "<|de|>": 11}, "task_to_id": {"transcribe": 20, "translate": 21},
               "is_multilingual": True, "forced_decoder_ids": None}  # fmt: skip
    assert read_decoding(make_speech_model(**several)).prompt == (1, 10, 20, 5)
    assert read_decoding(make_speech_model(**several, language="de", task="translate")).prompt == (1, 11, 21, 5)
    with pytest.raises(CheckpointError, match="no language 'xx'"):
        read_decoding(make_speech_model(**several, language="xx"))


def test_transcriptions_are_those_of_transformers_generate(whisper: Path) -> None:
    import torch
    from transformers import AutoModelForSpeechSeq2Seq

    from optimize.targets.runtimes import open_session

    asked = Examples([{"audio": {"drawn": index}} for index in range(4)], cells=[Cell(4, new=4)], max_length=44)
    clips = encode_all(whisper, asked)["cells"][0]["input_features"]
    session: Any = open_session(Kind.CHECKPOINT, whisper, TASK.name, 1)
    ours = write_until(session, list(clips), 12, lambda tokens: tokens[-1] == 2)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(whisper).eval()
    theirs = model.generate(torch.from_numpy(clips), max_new_tokens=12, do_sample=False).tolist()
    assert len({tuple(row) for row in ours}) > 1, "clips are heard, not only a prompt continued"
    for found, expected in zip(ours, theirs, strict=True):
        kept = [token for token in expected if token not in (0, 1, 5)]
        assert kept[: len(found)] == found[: len(kept)] and len(kept) >= 8


@pytest.mark.parametrize("kind", [Kind.CHECKPOINT, Kind.OPENVINO])
def test_steps_score_what_a_whole_transcription_scores(kind: Kind, whisper: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSpeechSeq2Seq

    from optimize.passes.convert_openvino import ConvertOpenvino
    from optimize.pipeline.contract import Artifact, Context
    from optimize.targets.cpu import probe
    from optimize.targets.runtimes import open_session

    folder = whisper
    if kind is Kind.OPENVINO:
        ConvertOpenvino().run(Artifact(Kind.CHECKPOINT, whisper, "", ""), Context(TASK.name, probe()), tmp_path)
        folder = tmp_path
    session: Any = open_session(kind, folder, TASK.name, 1)
    asked = Examples([{"audio": {"drawn": index}} for index in range(3)], max_length=44)
    clips = [each["input_features"] for each in encode_all(whisper, asked)["evaluation"]]
    tokens = np.array([[30, 31, 32], [40, 41, 42], [50, 51, 52]])
    model = AutoModelForSpeechSeq2Seq.from_pretrained(whisper).eval()
    ids = np.concatenate([np.tile([1, 5], (3, 1)), tokens[:, :-1]], axis=1)
    with torch.inference_mode():
        expected = (
            model(torch.from_numpy(np.stack(clips)), decoder_input_ids=torch.from_numpy(ids)).logits[:, 1:].numpy()
        )
    kept = [token for token in range(512) if token not in (3, 4, 262, 7, 2)]
    scale = np.abs(expected).max()
    stepped = [session.prefill(clips, 3), session.step(tokens[:, 0]), session.step(tokens[:, 1])]
    for index, found in enumerate(stepped):
        assert np.abs(found - expected[:, index])[:, kept].max() < 1e-3 * scale
        assert (found[:, [3, 4, 262]] == -1e4).all() and ((found[:, [7, 2]] == -1e4).all() == (index == 0))
    for row, clip in enumerate(clips):
        found = session.logits(clip, tokens[row])
        assert np.abs(found - expected[row])[:, kept].max() < 1e-3 * scale
        assert found[0, 7] == -1e4 < found[1, 7]


# Word errors


def test_word_accuracy_is_one_less_the_rate_of_errors() -> None:
    truths = ["the cat sat", "on the mat", ""]
    (metric,) = word_accuracy(truths, ["the cat sat", "on the mat", ""], ["the cat", "on a mat mat", "oh"])
    assert metric.reference == 1.0 and metric.candidate == pytest.approx(1 - 4 / 6)
    assert metric.drop.value == pytest.approx(4 / 6) and metric.drop.low <= metric.drop.value <= metric.drop.high
    (same,) = word_accuracy(truths, ["a", "b", ""], ["a", "b", ""])
    assert same.drop.low == same.drop.high == 0 and same.examples == 3


# Whole runs


def test_speech_is_judged_emitted_verified_and_loaded(whisper: Path, sounds: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipes = ("cast-dtype", "convert-openvino", "convert-openvino,quantize-openvino{mode=weights}")
    given = [word for recipe in recipes for word in ("--recipe", recipe)]
    outcome = cli(whisper, "--data", sounds, *given, "--max-drop", "0.2", *QUICK, "--out", out)
    assert outcome.code == 0, outcome.output
    assert outcome.report is not None
    assert "12 examples of" in outcome.output and "(batch of clips + new tokens)" in outcome.output
    candidates = {each["recipe"]: each for each in outcome.report["candidates"]}
    assert all(each["status"] == "passed" for each in candidates.values()), outcome.output
    exact = candidates["convert-openvino"]["accuracy"]
    assert abs(exact["drop"]["value"]) < 1e-3 and exact["agreement"] == 1.0 and exact["top1"] == 1.0
    (metric,) = exact["metrics"]
    assert metric["name"].startswith("word accuracy") and metric["examples"] == 12 and metric["drop"]["value"] == 0
    facts = candidates[recipes[2]]["steps"][1]["facts"]
    assert facts["quantized"] == facts["eligible"] > 20, "both models"
    cells = candidates["convert-openvino"]["speed"]["cells"]
    assert [each["cell"]["new"] for each in cells] == [4, 4] and all(each["first"] for each in cells)
    verified = cli("verify", out, "--budget", "1s", "--max-load", "1")
    assert verified.report is not None and verified.report["rejected"] is None, verified.output
    assert verified.report["accuracy"]["metrics"] == outcome_metrics(outcome.report)
    _check_loaded(whisper, out, sounds.parent)


def outcome_metrics(report: dict[str, Any]) -> Any:
    """Of what was emitted."""
    return next(each["accuracy"]["metrics"] for each in report["candidates"] if each["name"] == report["emitted"])


def _check_loaded(whisper: Path, out: Path, folder: Path) -> None:
    """What is loaded writes what the card's lines write."""
    from transformers import AutoFeatureExtractor, AutoTokenizer

    import optimize

    rate = 16000
    soundfile.write(folder / "clip.wav", draw(0, rate), rate)
    sound = soundfile.read(folder / "clip.wav", dtype="float32")[0]
    features = AutoFeatureExtractor.from_pretrained(out)(sound, sampling_rate=rate, return_tensors="pt")[
        "input_features"
    ]
    model: Any = optimize.load(out)
    tokens = model.generate(features, max_new_tokens=40)
    assert tokens.shape[0] == 1 and 1 <= tokens.shape[1] <= 40
    with pytest.raises(ValueError, match=r"not \[batch, 16, 600\]"):
        model.generate(features[..., :100])
    with pytest.raises(ValueError, match="max_new_tokens is 400"):
        model.generate(features, max_new_tokens=400)
    card = (out / "README.md").read_text()
    lines = card.split("```python\n")[1].split("```")[0].replace("clip.wav", str(folder / "clip.wav"))
    short = lines.replace("< 128", "< 40")
    done = subprocess.run([sys.executable, "-c", short], cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = AutoTokenizer.from_pretrained(out).decode(tokens[0], skip_special_tokens=True)
    assert done.stdout.strip() == text.strip()


def test_what_speech_needs_is_said_in_words(whisper: Path, cli: Cli, tmp_path: Path) -> None:
    planned = cli(whisper, "--dry-run")
    assert planned.code == 0 and "drawn sounds" in planned.output and "openvino-int8-weights" in planned.output
    assert "'1x32' is not BATCH+NEW" in cli(whisper, "--workload", "1x32", "--dry-run").output
    assert "longer than the model's limit of 44 tokens" in cli(whisper, "--workload", "1+48", "--dry-run").output
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in whisper.iterdir():
        if path.name != "preprocessor_config.json":
            (bare / path.name).write_bytes(path.read_bytes())
    assert "has no feature extractor (preprocessor_config.json)" in cli(bare, "--dry-run").output
    data = write(tmp_path / "d.jsonl", [{"sound": "a.wav"}])
    assert "has no column audio" in cli(whisper, "--data", data, "--dry-run").output
    assert json.loads((whisper / "generation_config.json").read_text())["no_timestamps_token_id"] == 5
