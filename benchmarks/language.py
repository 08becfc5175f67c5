"""A language model beside what other tools make of it, in one run; then whole documents, continuations and spelling.

    python benchmarks/language.py CHECKPOINT [--out benchmarks/results] [--budget 20m] [--cache DIR] [--report FILE]

Writes language.json, the report of RECIPES and PEERS at a gate of 3%, and language-texts.json. There,
of the float32 model and of each artifact: ten prompts continued greedily, side by side, and which texts of the
tokenizer's corpus it spells otherwise; of the float32 model and the emitted artifact: the perplexity of gensim's
300 news documents.
"""

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
from importlib.metadata import files
from pathlib import Path
from typing import Any

from optimize.models.encoding import load_tokenizer
from optimize.models.spelling import TEXTS, spelling_problems
from optimize.pipeline.contract import Kind
from optimize.pipeline.driver import cache_folder
from optimize.pipeline.language import score
from optimize.pipeline.store import Entry, Store
from optimize.targets.runtimes import open_session
from optimize.targets.runtimes.generating import generate

TASK = "text-generation"
NEWS = "lee_background.cor"
NEW, WINDOW = 32, 512
# of the CPU's: those that can win here, and what they are held against
RECIPES = ("openvino-int8-weights-smooth", "openvino-int8-weights", "openvino-int8-weights-bf16", "genai-int8",
           "gguf-q8_0", "gguf-q4_1", "compiled-bf16", "torchao-int8-weights-compiled")  # fmt: skip
# what each tool's users get by its command line; see peers/language/peer_passes.py
PEERS = ("peer-optimum-intel", "peer-olive")
PROMPTS = (
    "The capital of France is", "Water boils at a temperature of", "In 1969, the first people on the moon",
    "To bake bread you need flour,", "def fibonacci(n):\n", "The opposite of hot is", "Once upon a time, in a village",
    "Q: What is 12 + 7?\nA:", "La capitale de l'Italie est", "The three primary colours are",
)  # fmt: skip


def look(kind: Kind, path: Path, checkpoint: Path, news: str | None) -> dict[str, Any]:
    """In a process of its own: what one artifact writes, misspells, and with `news` how it finds that text."""
    session: Any = open_session(kind, path, TASK, len(os.sched_getaffinity(0)))
    tokenizer = load_tokenizer(checkpoint)
    found: dict[str, Any] = {"continuations": []}
    for prompt in PROMPTS:
        written = generate(session, [tokenizer(prompt, return_tensors="np")["input_ids"][0]], NEW).tokens[0]
        found["continuations"].append(tokenizer.decode(written))
    problems = spelling_problems(checkpoint, session)
    found["spelling"] = {"own": hasattr(session, "tokenize"), "texts": len(TEXTS), "problems": problems}
    return found | ({"news": perplexity(session, tokenizer(news, return_tensors="np")["input_ids"][0])} if news else {})


def perplexity(session: Any, tokens: Any) -> dict[str, float]:
    """Of all tokens but the first: windows of WINDOW, each of which scores what the one before did not."""
    loss, scored = 0.0, 0
    for start in range(0, len(tokens), WINDOW // 2):
        window = tokens[max(start - WINDOW // 2, 0) : start + WINDOW // 2]
        new = window[-(len(tokens[start : start + WINDOW // 2]) - (start == 0)) :]
        loss += float(score(session.logits(window[:-1], len(new)), new)["loss"].sum(dtype="float64"))
        scored += len(new)
    return {"tokens": len(tokens), "scored": scored, "perplexity": math.exp(loss / scored)}


def run(checkpoint: Path, report: Path, budget: str, cache: Path) -> None:
    """RECIPES and PEERS, in one run."""
    recipes = [word for name in (*RECIPES, *PEERS) for word in ("--recipe", name)]
    peers = os.pathsep.join([str(Path(__file__).parent / "peers" / "language"), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        words = [checkpoint, "--max-drop", "0.03", "--budget", budget, *recipes, "--cache", cache, "--json", report]
        subprocess.run(
            [sys.executable, "-m", "optimize.pipeline.cli", *words, "--out", Path(folder, "emitted")],
            env={**os.environ, "PYTHONPATH": peers}, check=True,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--budget", default="20m")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--report", type=Path, help="of such a run, whose artifacts are still in the cache")
    given = parser.parse_args()
    cache = cache_folder(given.cache)
    if given.report is None:
        run(given.checkpoint, given.out / "language.json", given.budget, cache)
    report = json.loads((given.report or given.out / "language.json").read_text())
    store = Store(cache / "store")
    (corpus,) = (path for path in files("gensim") or () if path.name == NEWS)
    news = Path(str(corpus.locate())).read_text(encoding="utf-8")
    sides = {"eager-f32": (Kind.CHECKPOINT, given.checkpoint)}
    for candidate in report["candidates"]:
        entry = store.get(candidate["steps"][-1]["key"]) if candidate["steps"] else None
        if isinstance(entry, Entry):
            sides[candidate["name"]] = (entry.artifact.kind, entry.artifact.path)
    found = {}
    for name, (kind, path) in sides.items():
        whole = news if name in ("eager-f32", report["emitted"]) else None
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[name] = pool.apply(look, (kind, path, given.checkpoint, whole))
        print(name, found[name].get("news", ""), len(found[name]["spelling"]["problems"]), flush=True)
    for index, prompt in enumerate(PROMPTS):
        print(f"\n{prompt!r}")
        for name, side in found.items():
            print(f"  {name:<24} {side['continuations'][index]!r}")
    result = {"host": report["host"], "emitted": report["emitted"], "prompts": PROMPTS, "sides": found}
    (given.out / "language-texts.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
