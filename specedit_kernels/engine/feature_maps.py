# SPDX-License-Identifier: Apache-2.0
"""What autoencoders do to maps [B, C, H, W] between their convolutions, in as few passes over memory as it takes.

PyTorch adds the bias of a convolution of cuDNN by a launch of its own, which with channels last is not vectorised, nor
are its nearest upsampling and its padding there.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ._diffusers import foreign_forward, hooked, is_wrapper

_WORD = torch.int64  # what the copies below move at a time, where a pixel's channels are a whole number of them


class UnbiasedConv2d(torch.nn.Conv2d):
    """A convolution whose bias is added by what takes its result."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)


class BiasedConv2d(UnbiasedConv2d):
    """A convolution whose bias an op adds."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        assert self.bias is not None
        ops.add_bias_(y, self.bias)
        return y


def with_plain_bias(conv: Any) -> TypeGuard[torch.nn.Conv2d]:
    """Whether a module is a convolution and no more than that class's forward, with a plain weight and a bias."""
    return (
        type(conv) is torch.nn.Conv2d
        and conv.bias is not None
        and conv.padding_mode == "zeros"
        and not any(is_wrapper(x) for x in (conv.weight, conv.bias))
        and not foreign_forward(conv)
        and not hooked(vars(conv), frozenset())
    )


def channels_lie_last(x: Tensor) -> bool:
    """Whether a map has its channels last in memory, and is no contiguous one as well."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def residual_sum(x: Tensor, bias: Tensor, residual: Tensor, residual_bias: Tensor | None = None) -> Tensor:
    """x + bias + residual + residual_bias, in the memory of x, biases of each channel. Rounded once."""
    x = x.to(torch.promote_types(x.dtype, residual.dtype))
    alike = (residual if x.is_contiguous() else residual.movedim(1, -1)).is_contiguous()
    if residual.dtype != x.dtype or not alike:
        residual = torch.empty_like(x).copy_(residual)
    ops.add_bias_(x, bias, residual, residual_bias)
    return x


def _words(x: Tensor) -> Tensor:
    """A map with channels last as [B, H, W, words of a pixel]."""
    pixels, size = x.permute(0, 2, 3, 1), x.element_size()
    whole = (pixels.shape[-1] * size) % _WORD.itemsize == 0 and (x.storage_offset() * size) % _WORD.itemsize == 0
    return pixels.view(_WORD) if whole else pixels


def doubled(x: Tensor) -> Tensor:
    """Twice as many rows and columns: each pixel four times, as `F.interpolate` has it ("nearest", scale_factor 2)."""
    if not channels_lie_last(x):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    words = _words(x)
    batch, rows, columns, count = words.shape
    each = words[:, :, None, :, None].expand(batch, rows, 2, columns, 2, count)
    return each.reshape(batch, 2 * rows, 2 * columns, count).view(x.dtype).permute(0, 3, 1, 2)


def padded_behind(x: Tensor, below: int = 1) -> Tensor:
    """A column of zeros more at the right, and so many rows below."""
    if not channels_lie_last(x):
        return F.pad(x, (0, 1, 0, below))
    words = _words(x)
    batch, rows, columns, count = words.shape
    made = words.new_empty(batch, rows + below, columns + 1, count)
    made[:, :rows, :columns] = words
    made[:, :rows, columns:] = 0
    made[:, rows:] = 0
    return made.view(x.dtype).permute(0, 3, 1, 2)
