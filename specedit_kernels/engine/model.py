# SPDX-License-Identifier: Apache-2.0
"""What the stages ask of a model: one adapter for each, and all they share behind it."""

from __future__ import annotations

import copy
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..sampling.flops import transformer_flops
from ..sampling.grid import Grid
from ..sampling.layout import SequenceLayout, table_key_bias
from . import strips
from ._diffusers import through
from .attention import attention_modules
from .kv_cache import KVCache
from .parallel import Ranks, of_first
from .registry import codec_of
from .sequence import StepLayout, TextWatch


@dataclass
class Text:
    """Text side of one guidance branch. embeds: [B, T, E]; an adapter's own kind has more.

    PER_SAMPLE: the fields with a row for each sample, or lists of such tensors.
    """

    PER_SAMPLE: ClassVar[tuple[str, ...]] = ("embeds",)

    embeds: Tensor

    def of_sample(self, index: int) -> Text:
        """That of one sample of the batch alone."""
        found = {name: getattr(self, name) for name in self.PER_SAMPLE}
        return replace(self, **{name: _row(value, index) for name, value in found.items()})


def version_of(x: Tensor) -> tuple[int, int]:
    """Another one for another tensor, and for other contents."""
    return id(x), -1 if x.is_inference() else x._version


def _row(value: Any, index: int) -> Any:
    if isinstance(value, (list, tuple)):
        return [_row(each, index) for each in value]
    return value if value is None else value[index : index + 1]


@dataclass(frozen=True)
class Pictures:
    """Which pictures a full-resolution sequence shows, in its order: the target, then the references.

    target: the target's fine grid. references: the fine grid of each reference, the edited one first; none where the
        model does not see its source.
    aligned: whether the edited one has the target's grid; then, and only then, its condition tokens can be fine
        where the target's are and coarse where they are coarse. All others keep one resolution in the mixed steps.
    coarse_others: whether those others are coarse there.
    """

    target: Grid
    references: tuple[Grid, ...]
    coarse_others: bool = False

    @property
    def aligned(self) -> bool:
        return bool(self.references) and self.references[0] == self.target

    @property
    def others(self) -> tuple[tuple[int, Grid], ...]:
        """(place in the sequence, fine grid) of each reference that is not laid out with the target."""
        first = 1 if self.aligned else 0
        return tuple((i + 1, g) for i, g in enumerate(self.references) if i >= first)


class EditModel(ABC):
    """A transformer and its autoencoder, as the stages see them.

    text: a `Text` of the adapter's own kind.
    A layout is what an adapter makes for one branch's text and one kind of sequence, and what it gets back with the
    tokens of that sequence: a frozen dataclass with a field `attention`, a StepLayout, or None for whole pictures in
    the transformer's own forward. The stages do not look into it.
    guidance: fp32 [B], a distilled guidance scale, or None. attention_kwargs: the caller's, given to every call.
    """

    # References are seen through keys and values that no step changes, which the model keeps: tokens are the target's.
    keeps_references = False
    # Keys and values that outlive a step are kept in fp8.
    fp8_cache = False
    # Of a batch of both guidance branches (`joined`) the negative one's samples are the first.
    negative_first = False
    # Who shares the sequence of a call, and who shares its guidance branches; None: nobody.
    ranks: Ranks | None = None
    guides: Ranks | None = None
    # What the model has in place of the calibrated thresholds of another: SpecEditConfig.resolved_threshold's `own`.
    thresholds: Mapping[tuple[str, str, str], Mapping[bool | str, float]] = MappingProxyType({})

    def __init__(
        self, transformer: torch.nn.Module, vae: torch.nn.Module, guidance: Tensor | None,
        attention_kwargs: dict[str, Any],
    ):  # fmt: skip
        # of a class that the engine does not know
        self.transformer: Any = transformer
        self.codec = codec_of(vae)
        self.guidance = guidance
        self.attention_kwargs = attention_kwargs

    def using(self, transformer: torch.nn.Module) -> EditModel:
        """The same model with other weights: a transformer of the same class."""
        other = copy.copy(self)
        other.transformer = transformer
        vars(other).pop("attentions", None)
        return other

    def of_sample(self, index: int) -> EditModel:
        """The same model for one sample of the batch alone."""
        other = copy.copy(self)
        other.guidance = None if self.guidance is None else self.guidance[index : index + 1]
        return other

    @functools.cached_property
    def attentions(self) -> list[torch.nn.Module]:
        """The attention modules of the transformer's blocks, in their order."""
        return attention_modules(self.transformer)

    @property
    def codec_ranks(self) -> Ranks | None:
        """Who shares the autoencoder's work: those of the sequence, or else those of the guidance branches."""
        return self.guides if self.ranks is None else self.ranks

    @functools.cached_property
    def shared_codec(self) -> Any:
        """The codec, its autoencoder shared out over `codec_ranks`."""
        return strips.over(self.codec, self.codec_ranks)

    @property
    def blocks(self) -> int:
        """Transformer blocks, each with one attention."""
        return len(self.attentions)

    @property
    def heads(self) -> tuple[int, int]:
        """(heads of a block's attention, channels of each)."""
        config = self.transformer.config
        return config.num_attention_heads, config.attention_head_dim

    @abstractmethod
    def dense_layout(self, text: Any, pictures: Pictures, grids: Sequence[Grid]) -> Any:
        """Layout of whole pictures: the target's grid, then each reference's, all at one reduction of `pictures`."""

    @abstractmethod
    def watched_layout(self, text: Any, pictures: Pictures, grids: Sequence[Grid], watch: TextWatch) -> Any:
        """`dense_layout` with attention of our own, which records what `watch` asks for."""

    @abstractmethod
    def mixed_layout(self, text: Any, pictures: Pictures, layout: SequenceLayout, key_bias: bool, cached: bool) -> Any:
        """Layout of a mixed-resolution sequence.

        key_bias: weigh coarse keys. cached: keep keys and values, for `active_layout`.
        """

    def active_layout(self, text: Any, layout: Any, first: int | None, lock_text: bool = False) -> Any:
        """Layout of a call that brings the first so many image slots of a cached mixed sequence, and attends to all.

        first: the slots that hold all fine target tokens; None: the call brings every slot. lock_text: it brings no
        text, whose keys and values stay.
        """
        made = layout.attention.active(text.embeds.shape[1], first, lock_text, self.least_text)
        return replace(layout, attention=made)

    def renewing(self, layout: Any) -> Any:
        """A layout of `active_layout` whose keys and values later calls read that do not bring its tokens."""
        return self._with_sequence(layout, passing=False)

    def edit_layout(
        self, text: Any, pictures: Pictures, layout: SequenceLayout, region: Tensor | None, text_mask: Tensor | None
    ) -> Any:
        """Layout of a sequence without empty slots whose image slots see text by their region: MixedSequence's."""
        made = self.mixed_layout(text, pictures, layout, key_bias=False, cached=False)
        if region is None:
            return made
        bias = made.attention.sequence.key_bias
        if bias is not None and text_mask is not None:  # some of the text is padding
            text_mask = text_mask & (bias[:, None, : text_mask.shape[-1]] > float("-inf"))
        return self._with_sequence(made, region=region, text_mask=text_mask)

    @staticmethod
    def _with_sequence(layout: Any, **changes: Any) -> Any:
        attention = layout.attention
        return replace(layout, attention=replace(attention, sequence=replace(attention.sequence, **changes)))

    def shield_layouts(
        self, source: Text, text: Text, pictures: Pictures, layout: SequenceLayout, first: int, region: Tensor | None,
        text_mask: Tensor | None,
    ) -> tuple[Any, Any]:  # fmt: skip
        """(layout of the source branch, that of an edit of its first so many slots over its keys and values).

        The first `fine_lengths` slots of each sample are the edit's own; others and all after are the branch's.
        """
        lengths = [x.embeds.shape[1] for x in (source, text)]
        # the two texts differ in length: each ends where the image begins
        longest = max(lengths)
        rows = longest + layout.capacity
        cache, made = self.new_cache(rows), []
        for x, length, sees in ((source, lengths[0], (None, None)), (text, lengths[1], (region, text_mask))):
            whole, unused = self.edit_layout(x, pictures, layout, *sees), longest - length
            row = torch.arange(unused, rows, dtype=torch.int32, device=layout.index.device)
            row = row.expand(layout.index.shape[0], -1).contiguous()
            whole = self._with_sequence(whole, rows=row, span=(unused, rows))
            made.append(replace(whole, attention=replace(whole.attention, cache=cache)))
        branch, edit = made
        return branch, self.active_layout(text, edit, first)

    def joined(self, texts: Sequence[Any]) -> Any:
        """One text for all guidance branches, stacked along the batch, where they run faster so; else None."""
        return None

    def new_cache(self, rows: int | None = None) -> KVCache:
        """An empty cache of a StepLayout. rows: KVCache's."""
        return KVCache(self.fp8_cache, rows)

    @property
    def least_text(self) -> int:
        """Text tokens that a call brings at least: layers of quantised weights may not take a text of none."""
        return int(any(type(weight) is not torch.nn.Parameter for weight in self.transformer.parameters()))

    def slots(self, count: int) -> int:
        """How many slots a sequence gets, where so many are needed; those after its length stay empty."""
        return count if self.ranks is None else -(-count // self.ranks.size) * self.ranks.size

    def agreed(self, x: Tensor) -> Tensor:
        """The first rank's x, where several work on one edit: what decides on a sequence has to be the same on all."""
        for ranks in (self.guides, self.ranks):
            x = x if ranks is None else of_first(x, ranks)
        return x

    def shared(self, attention: StepLayout | None, text: int, image: int) -> StepLayout | None:
        """The layout of a call of the transformer's own forward with that many tokens, whose hooks share them out.

        ValueError where the hooks cannot.
        """
        ranks = self.ranks
        if ranks is None:
            return attention
        if not ranks.anything and (text % ranks.size or image % ranks.size):
            raise ValueError(
                f"transformer: {ranks.size} ranks do not divide {text} text and {image} image tokens: expected"
                " ulysses_anything=True of ContextParallelConfig, or a runner other than 'eager'"
            )
        if attention is None:
            return None
        return replace(attention, sequence=replace(attention.sequence, ranks=ranks, by_stream=True))

    def timestep_conditioning(self, text: Any, timesteps: Tensor) -> Iterable[Any]:
        """What `velocity` needs to know of each of these timesteps, fp32 [n] in [0, 1000]: computed for all at once."""
        return timesteps.unbind()

    def conditionings(self, texts: Sequence[Any], timestep: Tensor) -> list[Any]:
        """The same of one timestep, fp32 [1] in [0, 1000], under each of these texts."""
        return [found for text in texts for found in self.timestep_conditioning(text, timestep)]

    @abstractmethod
    def velocity(self, text: Any, tokens: Tensor, conditioning: Any, layout: Any) -> Tensor:
        """Velocity for image tokens [B, S, 4C] at one `timestep_conditioning`: the shape of tokens."""

    def another_cache(self, layout: Any) -> Any:
        """A cached mixed layout whose keys and values are kept in a place of their own."""
        return replace(layout, attention=replace(layout.attention, cache=self.new_cache()))

    def blend(self, layout: Any, near: Any, far: Any, weight: Tensor) -> None:
        """Make what `layout` keeps near + weight (far - near) of what the two others do. weight: fp32, 0-dim."""
        of, a, b = (x.attention.cache for x in (layout, near, far))
        of.blend_(a, b, weight)

    def release(self, layouts: Sequence[Any]) -> None:  # noqa: B027
        """What these cached layouts, the last ones made, keep is needed no more: the next ones may take its memory.

        Nothing to do where it goes with the layouts.
        """

    def kv_bytes(self, layouts: Sequence[Any]) -> int:
        """Bytes of the keys and values that these cached mixed layouts keep."""
        return sum(layout.attention.cache.bytes for layout in layouts)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1], [B, 3, H, W] -> clean latents [B, C, h, w]."""
        return self.shared_codec.encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Clean latents [B, C, h, w] -> pixels in [-1, 1], [B, 3, H, W]."""
        return self.shared_codec.decode(latents)

    @abstractmethod
    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """True classifier-free guidance of two velocities of one shape."""

    @abstractmethod
    def embedder(self) -> torch.nn.Module:
        """The layer that brings packed tokens to the transformer's width."""

    def embed(self, tokens: Tensor) -> Tensor:
        """The transformer's embedding of packed tokens: [B, N, 4C] -> [B, N, width]."""
        return through(self.transformer, self.embedder(), tokens)

    def flops(self, text: Any, tokens: int, keys: int | None = None, lock_text: bool = False) -> int:
        """Useful FLOPs of one pass over one sample with that many image tokens, which attend to `keys` of them.

        lock_text: the text is attended to, not computed.
        """
        length = text.embeds.shape[1]
        keys = length + (tokens if keys is None else keys)
        return transformer_flops(tokens if lock_text else length + tokens, keys, math.prod(self.heads), self.blocks)


def in_order(rows: Tensor, layout: SequenceLayout) -> Tensor:
    """Values of the table's rows [rows, ...] in the order of each sample's sequence: [B, capacity, ...]."""
    batch = layout.index.shape[0]
    return ops.gather_tokens(rows[None].expand(batch, *rows.shape), layout.index, layout.capacity)


def key_bias_in_order(pictures: Pictures, layout: SequenceLayout) -> Tensor:
    """Natural log of each slot's multiplicity: fp32 [B, capacity]."""
    others = tuple(grid for _, grid in pictures.others)
    bias = table_key_bias(pictures.target, layout.index.device, others, pictures.coarse_others)
    return in_order(bias[:, None], layout)[..., 0]
