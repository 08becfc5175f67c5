"""Images to judge with: read from files, folders and bytes, drawn where nobody gives any, encoded as pipelines do."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from optimize.models.cells import read_file
from optimize.models.examples import read_examples
from optimize.models.images import DRAWN, draw, encode_all, open_image
from optimize.models.tasks import TASKS, Examples
from optimize.pipeline.contract import Cell
from optimize.pipeline.errors import RequestError
from tests.conftest import MakeCheckpoint
from tests.models.test_examples import write

TASK = TASKS["image-classification"]
LABELS = {0: "cat", 1: "dog"}


def picture(index: int, mode: str = "RGB", form: str = "PNG", size: tuple[int, int] = (20, 14)) -> bytes:
    """A file of noise."""
    pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form)
    return file.getvalue()


def source(folder: Path, content: bytes) -> Mapping[str, Any]:
    """What planning makes of a cell that names such a file."""
    (folder / "image").write_bytes(content)
    return read_file(str(folder / "image"), "image", "--data d.jsonl: row 1")


def test_a_folder_of_folders_is_read_with_its_labels(tmp_path: Path) -> None:
    for index in range(30):
        path = tmp_path / "data" / ("cat", "dog")[index % 2] / f"{index:02}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(index))
    (tmp_path / "data" / "cat" / "notes.txt").write_text("no image")
    found = read_examples(str(tmp_path / "data"), TASK, LABELS)
    assert found.labels is not None and found.kind == "class"
    named = [Path(row["image"]["path"]).parent.name for row in found.evaluation]
    assert [LABELS[label] for label in found.labels] == named and set(named) == {"cat", "dog"}
    assert len(found.evaluation) == 20 and len(found.calibration) == 10


def test_what_is_seen_twice_neither_repeats_nor_calibrates_what_is_judged(tmp_path: Path) -> None:
    for index in range(60):
        (tmp_path / f"{index}.png").write_bytes(picture(index % 20))
    found = read_examples(write(tmp_path / "d.jsonl", [{"image": f"{index}.png"} for index in range(60)]), TASK)
    digests = [row["image"]["sha256"] for row in (*found.evaluation, *found.calibration)]
    assert len(digests) == len(set(digests)) == 20


def test_the_digest_of_calibration_is_of_what_the_files_hold(tmp_path: Path) -> None:
    rows = [{"image": f"{index}.png"} for index in range(20)]
    for index in range(20):
        (tmp_path / f"{index}.png").write_bytes(picture(index))
    first = read_examples(write(tmp_path / "d.jsonl", rows), TASK).calibration_digest
    (tmp_path / "1.png").write_bytes(picture(99))  # the second row calibrates
    assert read_examples(write(tmp_path / "d.jsonl", rows), TASK).calibration_digest != first


def test_images_in_parquet_are_bytes_and_labels_go_by_their_names(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    rows = {
        "image": [{"bytes": picture(index), "path": f"{index}.png"} for index in range(24)],
        "label": [index % 2 for index in range(24)],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "d.parquet")
    found = read_examples(str(tmp_path / "d.parquet"), TASK, LABELS)
    assert found.evaluation[0]["image"]["bytes"] == picture(0) and found.labels is not None
    assert found.labels[0] == 1, "the data set's 0 is a dog, the model's a cat"


def test_a_data_set_of_the_hub_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = {"image": [{"bytes": picture(index), "path": None} for index in range(24)], "label": ["cat"] * 24}
    loaded = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    assert read_examples("maker/pictures", TASK, LABELS).evaluation[0]["image"]["bytes"] == picture(0)


def test_without_data_images_are_drawn_and_calibrate_nothing() -> None:
    found = read_examples(None, TASK)
    assert len(found.evaluation) == DRAWN and not found.calibration and "drawn" in found.source
    first, second, again = draw(0), draw(1), draw(0)
    assert np.array_equal(first, again) and first.shape != second.shape and first.dtype == np.uint8
    means = np.array([draw(index).mean(axis=(0, 1)) for index in range(DRAWN)])
    assert means.std(axis=0).min() > 25, "they are unlike"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "gone.png"}, "row 1: image .*gone.png cannot be read: No such file"),
        ({"image": ""}, "row 1: image is empty"),
        ({"image": 7}, "row 1: image is no file"),
        ({"picture": "a.png"}, "has no column image"),
    ],
)
def test_rows_without_an_image_are_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        read_examples(write(tmp_path / "d.jsonl", [row] * 30), TASK)


def test_a_class_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    with pytest.raises(RequestError, match="'bird' is not one of the model's"):
        read_examples(write(tmp_path / "d.jsonl", [{"image": "a.png", "label": "bird"}]), TASK, LABELS)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(RequestError, match="has no folders with images"):
        read_examples(str(tmp_path), TASK, LABELS)


@pytest.mark.parametrize(
    ("mode", "form"), [("L", "PNG"), ("LA", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("1", "PNG")]
)
def test_images_of_any_mode_are_converted(mode: str, form: str, tmp_path: Path) -> None:
    found = open_image(source(tmp_path, picture(0, mode, form)), "RGB")
    assert found.mode == "RGB" and found.size == (20, 14)


def test_an_image_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.new("RGB", (20, 14)).save(file, "JPEG", exif=exif)
    assert open_image(source(tmp_path, file.getvalue()), "RGB").size == (14, 20)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no image", "image cannot be read"), (picture(0)[:200], "image cannot be read")],
)
def test_what_is_no_image_is_refused_by_its_row(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"d.jsonl: row 1: {message}"):
        open_image(source(tmp_path, content), "RGB")


def test_sixteen_bits_a_channel_are_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(file, "PNG")
    with pytest.raises(RequestError, match="more than 8 bits"):
        open_image(source(tmp_path, file.getvalue()), "RGB")


def test_a_file_that_changes_after_planning_is_refused(tmp_path: Path) -> None:
    found = source(tmp_path, picture(0))
    (tmp_path / "image").write_bytes(picture(1))
    with pytest.raises(RequestError, match="changed while the run"):
        open_image(found, "RGB")


def test_inputs_are_those_of_transformers_pipelines(make_image_classifier: MakeCheckpoint, tmp_path: Path) -> None:
    from transformers import pipeline

    folder = make_image_classifier()
    found = source(tmp_path, picture(3, "CMYK", "JPEG"))
    encoded = encode_all(folder, Examples([{"image": found}], cells=[Cell(3)]))
    theirs = pipeline("image-classification", model=str(folder)).preprocess(str(tmp_path / "image"))["pixel_values"]
    assert np.array_equal(encoded["evaluation"][0]["pixel_values"], theirs.numpy())
    assert encoded["cells"][0]["pixel_values"].shape == (3, 3, 16, 16) and encoded["calibration"] == []


def test_a_model_of_one_channel_gets_grey(make_image_classifier: MakeCheckpoint) -> None:
    folder = make_image_classifier(num_channels=1)
    rows = [{"image": {"drawn": index}} for index in range(12)]
    encoded = encode_all(folder, Examples(rows, rows[:2], cells=[Cell(1)]))
    assert [each["pixel_values"].shape for each in encoded["evaluation"]] == [
        (1, 1, 16, 16), (2, 1, 16, 16), (8, 1, 16, 16), (1, 1, 16, 16)]  # fmt: skip
    assert [len(each["pixel_values"]) for each in encoded["calibration"]] == [1, 1]


def test_a_processor_that_keeps_proportions_is_refused(make_image_classifier: MakeCheckpoint) -> None:
    folder = make_image_classifier()
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"do_resize": False}))
    with pytest.raises(RequestError, match="of another"):
        encode_all(folder, Examples([{"image": {"drawn": index}} for index in range(3)]))
