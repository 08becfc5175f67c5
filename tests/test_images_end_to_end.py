"""Image classifiers, end to end: a small ViT that reads handwritten digits, and what is made of it and of a ResNet."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Cli, MakeCheckpoint

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WITHOUT_DATA = ("export-onnx", "export-onnx,quantize-onnx", "convert-openvino")
QUICK = ("--workload", "1,4", "--budget", "1s", "--min-speedup", "0.0001", "--max-load", "1")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """scikit-learn's handwritten digits, as grey images of 8 x 8, and what they are."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images * 15.9).astype(np.uint8), found.target


@pytest.fixture(scope="module")
def reader(make_image_classifier: MakeCheckpoint, digits: Any) -> Path:
    """A ViT that was taught the first 1,400 digits, in seconds."""
    import torch
    from transformers import AutoImageProcessor, ViTForImageClassification

    folder = make_image_classifier(
        id2label=dict(enumerate(NAMES)), label2id={name: index for index, name in enumerate(NAMES)}
    )
    images, labels = digits
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pictures = [Image.fromarray(image).convert("RGB") for image in images[:1400]]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    targets = torch.from_numpy(labels[:1400])
    torch.manual_seed(0)
    model = ViTForImageClassification.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(12):
        for rows in torch.randperm(1400).split(50):
            torch.nn.functional.cross_entropy(model(pixel_values=pixels[rows]).logits, targets[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory, digits: Any) -> Path:
    """A hundred other digits, in a folder for each."""
    folder = tmp_path_factory.mktemp("digits")
    for index in range(1400, 1500):
        path = folder / NAMES[digits[1][index]] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(digits[0][index]).save(path)
    return folder


def test_labelled_images_calibrate_int8_and_judge_it(reader: Path, held: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = cli(
        reader, "--data", held, "--recipe", "export-onnx,quantize-onnx{mode=static}", "--max-drop", "0.05", *QUICK,
        "--out", out,
    )  # fmt: skip
    assert outcome.code == 0, outcome.output
    assert outcome.report is not None
    (candidate,) = outcome.report["candidates"]
    accuracy, macro = candidate["accuracy"]["metrics"]
    assert accuracy["name"] == "accuracy" and macro["name"] == "macro F1"
    assert accuracy["reference"] > 0.85 and accuracy["examples"] == 67
    facts = candidate["steps"][1]["facts"]
    assert facts["quantized"] == facts["eligible"] > 10, "convolutions among them"
    assert candidate["roofs"] and candidate["throughput"]["tokens_per_second"] > 0
    assert (out / "preprocessor_config.json").read_bytes() == (reader / "preprocessor_config.json").read_bytes()
    card = (out / "README.md").read_text()
    assert "image processor" in card and "| batch of images |" in card
    verified = cli("verify", out, "--budget", "1s", "--max-load", "1")
    assert verified.report is not None and verified.report["accuracy"]["metrics"] == candidate["accuracy"]["metrics"]
    assert verified.report["rejected"] is None
    picture = next(iter(sorted((held / "seven").iterdir())))
    _check_loaded(out, picture)
    _check_card(out, card, picture)


def _check_loaded(out: Path, picture: Path) -> None:
    from transformers import AutoImageProcessor, pipeline

    import optimize

    model, processor = optimize.load(out), AutoImageProcessor.from_pretrained(out, backend="pil")
    best = pipeline("image-classification", model=model, image_processor=processor)(str(picture))[0]
    assert best["label"] == "seven" and best["score"] > 0.5
    with pytest.raises(ValueError, match=r"not \[batch, 3, 16, 16\]"):
        model(pixel_values=np.zeros((1, 3, 8, 8)))
    with pytest.raises(ValueError, match="pixel_values alone"):
        model(input_ids=np.zeros((1, 8)))


def _check_card(out: Path, card: str, picture: Path) -> None:
    """The lines that the card prints run, and say what the picture is."""
    lines = card.split("```python\n")[1].split("```")[0].replace("image.png", str(picture))
    done = subprocess.run(
        [sys.executable, "-c", lines + "\nprint(outputs['logits'].argmax())"], cwd=out, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.strip().endswith("7"), done.stderr


@pytest.mark.parametrize(
    ("architecture", "recipes"),
    [
        ("ViTForImageClassification", ("convert-openvino",)),  # others are run on one above
        ("ResNetForImageClassification", ("cast-dtype,compile-aoti", *WITHOUT_DATA)),
    ],
)
def test_recipes_that_need_no_data_answer_as_eager_does(
    architecture: str, recipes: tuple[str, ...], make_image_classifier: MakeCheckpoint, cli: Cli, tmp_path: Path
) -> None:
    given = [word for recipe in recipes for word in ("--recipe", recipe)]
    outcome = cli(make_image_classifier(architecture), *given, *QUICK, "--max-drop", "0.01", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.output
    assert outcome.report is not None
    for candidate in outcome.report["candidates"]:
        assert candidate["status"] == "passed", candidate
        assert candidate["accuracy"]["examples"] == 96 and set(candidate["accuracy"]["cells"]) == {"1", "4"}
    assert "96 examples of drawn images" in outcome.output


def test_where_int8_leaves_the_reference_is_explained(
    make_image_classifier: MakeCheckpoint, cli: Cli, cache: Path, tmp_path: Path
) -> None:
    outcome = cli(
        make_image_classifier("ResNetForImageClassification"), "--recipe", "export-onnx,quantize-onnx", *QUICK,
        "--max-drop", "1e-9", "--out", tmp_path / "out", cache=cache,
    )  # fmt: skip
    assert outcome.code == 4, outcome.output
    explained = cli("explain", next((cache / "runs").iterdir()), "--cache", cache)
    assert explained.code == 0 and "quantize-onnx" in explained.output, explained.output
    assert "layers, in the order of execution" in explained.output


def test_static_int8_is_left_out_without_data(make_image_classifier: MakeCheckpoint, cli: Cli) -> None:
    planned = cli(make_image_classifier(), "--dry-run")
    assert planned.code == 0, planned.output
    assert "no photographs), no others to calibrate" in planned.output
    assert "left out: openvino-int8: quantize-openvino: no calibration data (--data would give some)" in planned.output


def test_what_is_no_image_ends_the_run_in_words(
    make_image_classifier: MakeCheckpoint, held: Path, cli: Cli, tmp_path: Path
) -> None:
    files = sorted(held.glob("*/*.png"))[:20]
    rows = [{"image": str(path)} for path in files]
    broken = tmp_path / "broken.png"
    broken.write_bytes(files[0].read_bytes()[:60])
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(map(json.dumps, [{"image": "broken.png"}, *rows])))
    outcome = cli(make_image_classifier(), "--data", data, "--recipe", "export-onnx", *QUICK)
    assert outcome.code == 2 and "row 1: image cannot be read" in outcome.output, outcome.output
    assert "Traceback" not in outcome.output
