# SPDX-License-Identifier: Apache-2.0
"""Keys and values that outlive a step in half their bytes: fp8, with a scale for each token and head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops

DTYPE = torch.float8_e4m3fn
SCALES = torch.float32
# larger values are rounded to NaN, on a CUDA device and on a CPU
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

    def values(self) -> tuple[Tensor, ...]:
        """Keys and values in the scratch's dtype: copies."""
        self.load()
        return tuple(x.clone() for x in self.scratch)

    def store(self) -> None:
        k, v, k_scale, v_scale = self.kept
        for x, packed, scale in zip(self.scratch, (k, v), (k_scale, v_scale)):
            pack_(packed, scale, x)


class PrefixedKV(PackedKV):
    """Packed keys and values of some rows behind others that no step changes and that are kept as they are.

    own: the packed ones; prefix: keys and values of the rows in front. scratch: of both, which ends with that of `own`.
    """

    def __init__(self, own: PackedKV, prefix: Sequence[Tensor], scratch: Sequence[Tensor]):
        super().__init__(own.kept, scratch)
        self.own, self.prefix = own, tuple(prefix)

    def load(self) -> None:
        for x, prefix in zip(self.scratch, self.prefix):
            x[:, : prefix.shape[1]].copy_(prefix)
        self.own.load()

    def store(self) -> None:
        self.own.store()


# How far above the largest value of a whole sequence the e4m3 range of its scale ends. Later steps renew rows under the
# same scale; numbers from a 2^11th of that largest value on stay normal ones.
HEADROOM = 8


class Fp8KV(NamedTuple):
    """Keys and values of one block in e4m3, of which attention in e4m3 reads them.

    k: [B, rows, H, D], whole panels. v: [B, rows / PANEL, H, D, PANEL]. scales: fp32 [B, 1, H]; those of q and k bound
    what their norm and rotation give, so they hold for all steps; that of v is of the last whole sequence.
    """

    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor

    @property
    def scales(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_scale, self.k_scale, self.v_scale

    def set_scales_(self, streams: Sequence[Any]) -> None:
        """For a whole sequence of these `sequence.Stream`s, before it is written."""
        for scale in self.scales:
            scale.fill_(torch.finfo(SCALES).tiny)
        for x in streams:
            ops.raise_scales_fp8_(
                *self.scales, x.qkv[2], q_weight=x.norm_q.weight, k_weight=x.norm_k.weight, headroom=HEADROOM
            )

    def blend_(self, near: Fp8KV, far: Fp8KV, weight: Tensor) -> None:
        """Keep near + weight (far - near). weight: fp32, 0-dim."""
        ops.lerp_fp8_(self.k, self.k_scale, near.k, near.k_scale, far.k, far.k_scale, weight)
        ops.lerp_fp8_(self.v, self.v_scale, near.v, near.v_scale, far.v, far.v_scale, weight)
        self.q_scale.copy_(near.q_scale)


class KVCache:
    """Keys and values of each block of one sequence that outlive a step of the transformer's own forward.

    A block's are its attention processor's `kept` while a call runs (`attention.with_layout`), and here between calls:
    a compiled block guards on its own processor, where a table of all blocks would have it guard on the table's length.
    packed: in fp8. rows: how many keys are kept, None: those of the call that fills the cache. pairs: of each processor
    keys and values [B, rows, Hk, D], packed ones with their scales after them; None before the first call.
    """

    def __init__(self, packed: bool = False, rows: int | None = None):
        self.packed, self.rows = packed, rows
        self.pairs: list[tuple[Tensor, ...] | None] = []
        self.dtype = torch.float32  # of what was packed last

    def blank(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows, zeros, of the kind of k and v."""
        assert self.rows is not None
        shape = (k.shape[0], self.rows, *k.shape[2:])
        return k.new_zeros(shape), v.new_zeros(shape)

    def pack(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """As a processor keeps them; `v` may be a view of more than itself, what is kept is not."""
        self.dtype = v.dtype
        if not self.packed:
            return k, v.contiguous()
        kept = [torch.empty_like(x, dtype=DTYPE) for x in (k, v)]
        kept += [torch.empty_like(x[..., :1], dtype=SCALES) for x in (k, v)]
        PackedKV(kept, (k, v)).store()
        return tuple(kept)

    def unpack(self, kept: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What `pack` gave as keys and values: the very tensors, or, of packed ones, copies in `dtype`."""
        if not self.packed:
            return kept
        packed = PackedKV(kept, [torch.empty_like(x, dtype=dtype) for x in kept[:2]])
        packed.load()
        return packed.scratch

    def blend_(self, near: KVCache, far: KVCache, weight: Tensor) -> None:
        """Keep near + weight (far - near), of two caches of one sequence. weight: 0-dim, in [0, 1]."""
        pairs = []
        for a, b in zip(near.pairs, far.pairs):
            kept = None
            if a is not None and b is not None:
                both = zip(near.unpack(a, near.dtype), far.unpack(b, near.dtype))
                k, v = (torch.lerp(x, y, weight.to(x.dtype)) for x, y in both)
                kept = self.pack(k, v)
            pairs.append(kept)
        self.pairs = pairs

    @property
    def bytes(self) -> int:
        """Memory that is kept."""
        return sum(x.numel() * x.element_size() for pair in self.pairs if pair for x in pair)
