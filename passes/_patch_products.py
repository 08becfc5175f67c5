"""Convolutions over patches as products, in a torch model: a convolution's kernels are slow where patches are large.

Patches neither overlap nor leave gaps, so that a window's values are a row of a matrix, each in one row only.
Source: https://arxiv.org/abs/2010.11929 (section 3.1: a linear projection of flattened patches)
"""

from __future__ import annotations

from typing import Any


def patches_as_products(model: Any) -> int:
    """Replace the convolutions of `model` whose windows are patches. Returns how many were."""
    import torch

    class Patches(torch.nn.Module):  # type: ignore[misc]
        """[batch, channels, height, width] -> [batch, features, rows, columns]; what fills no patch is left out."""

        def __init__(self, convolution: Any) -> None:
            super().__init__()
            self.sizes = convolution.kernel_size
            self.weight = torch.nn.Parameter(convolution.weight.flatten(1), requires_grad=False)
            self.bias = convolution.bias

        def forward(self, images: Any) -> Any:
            batch, channels, height, width = images.shape
            high, wide = self.sizes
            rows, columns = height // high, width // wide
            cut = images[..., : rows * high, : columns * wide].reshape(batch, channels, rows, high, columns, wide)
            patches = cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * high * wide)
            found = torch.nn.functional.linear(patches, self.weight, self.bias)
            return found.transpose(1, 2).reshape(batch, len(self.weight), rows, columns)

    found = [name for name, each in model.named_modules() if _cuts_patches(each)]
    for name in found:
        model.set_submodule(name, Patches(model.get_submodule(name)))
    return len(found)


def _cuts_patches(layer: Any) -> bool:
    import torch

    return (
        type(layer) is torch.nn.Conv2d
        and layer.kernel_size == layer.stride
        and layer.kernel_size != (1, 1)
        and layer.padding == (0, 0)
        and layer.dilation == (1, 1)
        and layer.groups == 1
    )
