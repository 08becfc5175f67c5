"""What is rewritten in a model before it is captured: it computes the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._C import _get_sdp_priority_order
from torch.nn.attention import SDPBackend
from transformers import ViTConfig, ViTForImageClassification
from transformers.masking_utils import create_bidirectional_mask

from optimize.models.loading import load_model
from optimize.passes._cuda_graphs import GRAPHS, Captured
from optimize.passes._masks import SPARED, spare_masks
from optimize.passes._patch_products import patches_as_products
from tests.conftest import MakeCheckpoint


@pytest.mark.parametrize(("side", "stride", "replaced"), [(4, 4, 1), ((4, 2), (4, 2), 1), (3, 2, 0), (1, 1, 0)])
def test_a_convolution_over_patches_becomes_a_product(side: int, stride: int, replaced: int) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 17, 10)  # which no patches fill
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, side, stride)).eval()
    with torch.inference_mode():
        expected = model(images)
        assert patches_as_products(model) == replaced
        np.testing.assert_allclose(model(images), expected, atol=1e-6)
    assert any(isinstance(each, torch.nn.Conv2d) for each in model.modules()) is not replaced


def test_what_is_padded_or_grouped_stays_a_convolution() -> None:
    for options in ({"padding": 1}, {"groups": 2}, {"dilation": 2}):
        model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 2, 2, **options))
        assert patches_as_products(model) == 0


def test_where_nothing_is_masked_no_mask_is_made_while_a_model_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTForImageClassification(ViTConfig(image_size=32, **sizes)).eval()
    images, tokens = torch.randn(2, 3, 32, 32), torch.randn(2, 5, 32)
    with torch.inference_mode():
        expected = model(images).logits
        for name in ("is_tracing", "is_torchdynamo_exporting"):  # one or the other, by the version
            monkeypatch.setattr(f"transformers.masking_utils.{name}", lambda *_: True, raising=False)
        assert create_bidirectional_mask(model.config, tokens, None) is not None
        spare_masks(model)
        assert model.config._attn_implementation == SPARED
        assert create_bidirectional_mask(model.config, tokens, None) is None
        np.testing.assert_allclose(model(images).logits, expected, atol=1e-6)
        padded = torch.tensor([[1, 1, 1, 1, 0]] * 2)
        kept = create_bidirectional_mask(model.config, tokens, padded)
    assert kept is not None and kept[0, 0].tolist() == [[True, True, True, True, False]] * 5


@pytest.mark.parametrize(("attention", "first"), [("cudnn", "CUDNN_ATTENTION"), ("efficient", "EFFICIENT_ATTENTION")])
def test_the_kernel_for_attention_that_is_named_comes_first_while_it_is_captured(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: str, first: str
) -> None:
    attend, seen, before = torch.nn.functional.scaled_dot_product_attention, list[int](), _get_sdp_priority_order()

    def watched(*given: Any, **options: Any) -> torch.Tensor:
        seen.append(_get_sdp_priority_order()[0])
        return attend(*given, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    folder, task = tmp_path / "a", "feature-extraction"
    shutil.copytree(make_checkpoint(), folder)
    settings = {"shapes": [(2, 8)], "compile": False, "autotune": False, "fill": 0}
    for asked in (settings, settings | {"attention": "sdpa"}, settings | {"attention": attention}):
        (folder / GRAPHS).write_text(json.dumps(asked))
        Captured(folder, load_model(folder, task), task)
    assert seen == [before[0]] * 10 + [int(getattr(SDPBackend, first))] * 2  # two layers; it is called once before
    assert _get_sdp_priority_order() == before
