"""Images to the arrays that a model is fed, with the checkpoint's own image processor: only a worker does this.

As transformers' pipelines do it, an image is first turned as its EXIF says and converted to RGB, whatever it is: grey,
with a palette, CMYK. Alpha is dropped. A model of one channel gets it in grey.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimize.models.encoding import BATCH_SIZES
from optimize.models.tasks import Examples, read_json
from optimize.pipeline.batches import Encoded
from optimize.pipeline.errors import RequestError

PIXELS = "pixel_values"  # what every image classifier of transformers calls its input
DRAWN = 96  # images that are judged where nobody gives any
SHADES = 8  # a drawn image's colours and shapes, at most
WIDE = ("I", "F")  # modes, and beginnings of modes, of more than 8 bits a channel: PIL cuts them off at 255

Row = Mapping[str, Any]


def encode_all(folder: Path, asked: Examples) -> dict[str, list[Encoded]]:
    """See tasks.Encoder: float32 of [batch, channels, height, width]. Raises RequestError for what is no image."""
    judged, sizes = _pixels(folder, asked.evaluation), [cell.batch for cell in asked.cells]
    calibrating: Iterable[Any] = _pixels(folder, asked.calibration) if asked.calibration else ()
    turns = [BATCH_SIZES[index % len(BATCH_SIZES)] for index in range(len(judged))]
    ends = np.cumsum(turns)
    return {
        "evaluation": [{PIXELS: each} for each in np.split(judged, ends[ends < len(judged)])],
        "calibration": [{PIXELS: each[None]} for each in calibrating],
        "cells": [{PIXELS: judged[np.arange(size) % len(judged)]} for size in sizes],
    }


def encode_sample(folder: Path) -> Encoded:
    """See tasks.Encoder."""
    return {PIXELS: _pixels(folder, [{"image": {"drawn": index}} for index in range(2)])}


def _pixels(folder: Path, rows: Iterable[Row]) -> NDArray[np.float32]:
    """All images as one array. Raises RequestError where the processor does not make all of them one size."""
    processor = load_processor(folder)
    mode = image_mode(folder)
    found: list[NDArray[np.float32]] = []
    for row in rows:
        made = np.asarray(processor(images=[open_image(row["image"], mode)], return_tensors="np")[PIXELS], np.float32)
        if made.ndim != 4 or len(made) != 1 or (found and made[0].shape != found[0].shape):
            before = f", and {list(found[0].shape)} of another" if found else ""
            raise RequestError(
                f"{type(processor).__name__} makes {list(made.shape[1:])} of one image{before}",
                hint="images of one batch have one size: see do_resize and do_center_crop in preprocessor_config.json",
            )
        found.append(made[0])
    return np.stack(found)


def image_mode(folder: Path) -> str:
    """What every image is converted to, in PIL's words."""
    return "L" if read_json(folder / "config.json").get("num_channels") == 1 else "RGB"


def load_processor(folder: Path) -> Any:
    """A checkpoint's own, in its form that needs no torchvision; its code is never run."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True, trust_remote_code=False)


def open_image(source: Mapping[str, Any], mode: str) -> Any:
    """A PIL image of what a row names: a file (see cells.read_file), or a drawing. Raises RequestError for no image."""
    from PIL import Image, ImageOps

    if "drawn" in source:
        return Image.fromarray(draw(source["drawn"])).convert(mode)
    try:
        content = Path(source["path"]).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images
            image = Image.open(io.BytesIO(content))
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(
            f"{source['where']}: image cannot be read: {error}", hint="remove the row, or save the image again"
        ) from None
    if hashlib.sha256(content).hexdigest() != source["sha256"]:
        raise RequestError(f"{source['where']}: image was changed while the run was going on", hint="run it again")
    if image.mode.startswith(WIDE):
        raise RequestError(f"{source['where']}: image has more than 8 bits a channel", hint="convert it to 8 bits")
    return ImageOps.exif_transpose(image).convert(mode)


def draw(index: int) -> NDArray[np.uint8]:
    """The drawn image of that number, [height, width, 3], the same one every time: a gradient, shapes before it, a
    texture of waves and noise as fine as its number makes it, of sizes and proportions that photographs have.
    """
    random = np.random.default_rng(index)
    height, width = random.integers(160, 512, 2)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    colours = random.uniform(0, 255, (SHADES + 2, 3))
    turn = random.uniform(0, 2 * np.pi)
    slope = (x * np.cos(turn) + y * np.sin(turn))[..., None]
    image = colours[0] + (colours[1] - colours[0]) * (slope - slope.min()) / np.ptp(slope)
    for colour in colours[2 : 2 + index % (SHADES + 1)]:
        (row, column), (tall, wide) = random.uniform(0, 1, 2), random.uniform(0.05, 0.4, 2)
        across, down = np.abs(x - column) / wide, np.abs(y - row) / tall
        round_ = random.random() < 0.5
        image[(across**2 + down**2 < 1) if round_ else (np.maximum(across, down) < 1)] = colour
    for _ in range(3):
        across, down = random.normal(0, 2.0 ** random.integers(2, 8), 2)
        waves = np.sin(2 * np.pi * (across * x + down * y))[..., None]
        image += random.uniform(0, 25) * waves * random.uniform(-1, 1, 3)
    grain = 2 ** (index % 5)  # pixels of one grain of noise
    noise = random.normal(0, random.uniform(0, 40), (-(-height // grain), -(-width // grain), 3))
    image += noise.repeat(grain, axis=0).repeat(grain, axis=1)[:height, :width]
    return np.asarray(np.clip(image, 0, 255), dtype=np.uint8)
