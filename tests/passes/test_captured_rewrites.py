"""What is rewritten in a model before it is captured: it computes the same."""

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.masking_utils import create_bidirectional_mask

from optimize.passes._patch_products import patches_as_products
from optimize.passes._spared_masks import SPARED, spare_masks


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
