# SPDX-License-Identifier: Apache-2.0
"""Keys and values that outlive a step in half their bytes: fp8, with a scale for each token and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
SCALES = torch.float32
# what a CUDA device or a CPU rounds to no number lies beyond
_LARGEST = torch.finfo(DTYPE).max


def pack_(packed: Tensor, scale: Tensor, x: Tensor) -> None:
    """x [..., D] into packed (fp8, x's shape) and scale (fp32, [..., 1]): x = packed * scale to 3 bits and a sign's."""
    largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True, dtype=SCALES)
    # a row of zeros stays one
    scale.copy_(largest.div_(_LARGEST).clamp_(min=torch.finfo(SCALES).tiny))
    packed.copy_((x / scale).clamp_(-_LARGEST, _LARGEST))


def unpack_(x: Tensor, packed: Tensor, scale: Tensor) -> None:
    """The other way."""
    x.copy_(packed).mul_(scale)


class PackedKV:
    """Keys and values of one block in fp8, and where a step has them in the model's dtype.

    kept: keys, values, their scales. scratch: keys, values; all blocks may share it. [B, keys, H, D] each, scales [B,
    keys, H, 1]. A step calls `load` before it reads the scratch, and `store` where what it wrote there is to last.
    """

    def __init__(self, kept: Sequence[Tensor], scratch: Sequence[Tensor]):
        self.kept, self.scratch = tuple(kept), tuple(scratch)

    def __getitem__(self, index: int) -> Tensor:
        return self.scratch[index]

    def load(self) -> None:
        k, v, k_scale, v_scale = self.kept
        for x, packed, scale in zip(self.scratch, (k, v), (k_scale, v_scale)):
            unpack_(x, packed, scale)

    def store(self) -> None:
        k, v, k_scale, v_scale = self.kept
        for x, packed, scale in zip(self.scratch, (k, v), (k_scale, v_scale)):
            pack_(packed, scale, x)


class PackedDict(dict):
    """A dictionary of (keys, values) that keeps them in fp8; what is read is a copy in the dtype that was stored."""

    def __setitem__(self, key: Any, pair: tuple[Tensor, Tensor]) -> None:
        kept = [torch.empty_like(x, dtype=DTYPE) for x in pair]
        kept += [torch.empty_like(x[..., :1], dtype=SCALES) for x in pair]
        packed = PackedKV(kept, pair)
        packed.store()
        super().__setitem__(key, (packed.kept, pair[0].dtype))

    def __getitem__(self, key: Any) -> tuple[Tensor, Tensor]:
        kept, dtype = super().__getitem__(key)
        packed = PackedKV(kept, [torch.empty_like(x, dtype=dtype) for x in kept[:2]])
        packed.load()
        return packed.scratch

    def values(self) -> list[tuple[Tensor, ...]]:
        """Of each key what is kept: fp8 keys and values, and their scales."""
        return [kept for kept, _ in super().values()]
