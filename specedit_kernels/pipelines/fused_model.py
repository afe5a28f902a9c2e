# SPDX-License-Identifier: Apache-2.0
"""What the adapters of few launches share: slots, kept keys and values, adapters' scale, the autoencoder's launches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import Tensor

from ..sampling.layout import SequenceLayout
from . import kv_cache
from .attention import AttentionLayout, TextWatch
from .fused import Kept
from .fused import Sequence as FusedSequence
from .model import Text
from .runner import StepRunner

# Mixed sequences get slots by a sixteenth of their power of two, within these bounds: one capture then serves all edits
# of nearly one size, and few slots are empty.
FEWEST_SLOTS, MOST_SLOTS = 32, 128


@dataclass(frozen=True)
class FusedLayout:
    """sequence: the step's. fresh: int32 [B], the tokens that an active step computes, text included, or None.

    cache: where the keys and values of each block are kept, None to keep none; buffers: the runner's name for them.
    watch: a module's attention to the text is recorded there.
    """

    sequence: FusedSequence
    fresh: Tensor | None = None
    cache: list[Kept] | None = None
    buffers: str = ""
    watch: TextWatch | None = None


class FusedModel:
    """The part of a fused adapter that knows no model; a class has it before its EditModel."""

    def __init__(
        self, transformer: torch.nn.Module, vae: torch.nn.Module, guidance: Tensor | None,
        attention_kwargs: dict[str, Any], runner: StepRunner,
    ):  # fmt: skip
        super().__init__(transformer, vae, guidance, attention_kwargs)
        self.runner = runner
        self._caches = 0

    def slots(self, count: int) -> int:
        step = min(max((1 << (count - 1).bit_length()) // 16, FEWEST_SLOTS), MOST_SLOTS)
        return -(-count // step) * step

    @contextlib.contextmanager
    def _scaled(self) -> Iterator[None]:
        """Adapters at the caller's scale, as the transformer's own forward has them."""
        scale = self.attention_kwargs.get("scale", 1.0)
        if not USE_PEFT_BACKEND or scale == 1.0:
            yield
            return
        scale_lora_layers(self.transformer, scale)
        try:
            yield
        finally:
            unscale_lora_layers(self.transformer, scale)

    def _kept(self, name: str, batch: int, rows: int, like: Tensor) -> list[Kept]:
        """Of each block, where `rows` keys and values are kept; the dtype and device of `like`."""
        heads, dim = self.transformer.config.num_attention_heads, self.transformer.config.attention_head_dim

        def pairs(name: str, count: int, dim: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
            found = iter(self.runner.buffers(name, 2 * count, (batch, rows, heads, dim), dtype, like.device))
            return list(zip(found, found))

        if not self.fp8_cache:
            return pairs(name, self.blocks, dim, like.dtype)
        packed = pairs(name, self.blocks, dim, kv_cache.DTYPE)
        scales = pairs(f"{name}, scales", self.blocks, 1, kv_cache.SCALES)
        [scratch] = pairs(f"{name}, of the block at work", 1, dim, like.dtype)
        return [kv_cache.PackedKV((*pair, *of), scratch) for pair, of in zip(packed, scales)]

    def _mixed(
        self, text: Text, layout: SequenceLayout, same: AttentionLayout, cached: bool, kind: type, **more: Any
    ) -> FusedLayout:
        """The layout of a mixed sequence from the eager adapter's. kind: the class of sequences, more: its own fields.

        `same` has lengths in any case: a capture with them serves sequences with and without empty slots.
        """
        batch, length = text.embeds.shape[:2]
        cos, sin = (x[..., ::2].contiguous() for x in (same.cos, same.sin))
        sequence = kind(length, cos, sin, same.key_bias, same.lengths, same.lengths, **more)
        if not cached:
            return FusedLayout(sequence)
        name, self._caches = f"keys and values {self._caches}", self._caches + 1
        cache = self._kept(name, batch, length + layout.capacity, text.embeds)
        return FusedLayout(sequence, layout.fine_lengths + length, cache, name)

    def first_layout(self, text: Text, layout: FusedLayout, first: int | None, lock_text: bool = False) -> FusedLayout:
        whole, length = layout.sequence, text.embeds.shape[1]
        start = length if lock_text else 0
        # each sample's own fine tokens alone are computed anew
        fresh = whole.keys if first is None else layout.fresh
        end = whole.cos.shape[1] if first is None else length + first
        order = torch.arange(start, end, dtype=torch.int32, device=whole.cos.device)
        sequence = replace(
            whole,
            text=length - start,
            cos=whole.cos[:, start:end],
            sin=whole.sin[:, start:end],
            queries=fresh - start,
            rows=torch.where(order < fresh[:, None], order, -1),
            passing=first is not None,
        )
        return replace(layout, sequence=sequence)

    def kv_bytes(self, layouts: Sequence[FusedLayout]) -> int:
        return self.runner.buffer_bytes
