# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's transformers as the stages see them.

A step goes through the guider that the graph gives, so that its guidance, its hooks and its patches are in it. A
wrapper at the innermost place, right around the model's forward, does what the host cannot: it puts references of the
step's resolution in, or, in a mixed step, has the model run on the tokens of the mixed sequence with their own
positions, and sets the host's attention override to `mixed_res_attn` for that call. No weight and no module is touched.

To the guider, a mixed sequence is a latent picture that is one token wide: what a guider does to each value by itself,
as classifier-free guidance does, stays right.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.ldm.flux.model
import comfy.ldm.qwen_image.model
import torch
import torch.nn.functional as F
from torch import Tensor

from specedit_kernels import ops
from specedit_kernels.engine.model import EditModel, Pictures, Text, in_order, key_bias_in_order
from specedit_kernels.sampling.flops import transformer_flops
from specedit_kernels.sampling.grid import PATCH, Grid, pack, unpack
from specedit_kernels.sampling.layout import SequenceLayout, table_positions

METHODS = ("index", "offset")


@dataclass(frozen=True)
class WholeLayout:
    """Whole pictures: the target's grid, then each reference's."""

    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class MixedLayout:
    """A mixed sequence of image slots.

    ids: fp32 [B, slots, 3], the host's position ids. key_bias: fp32 [B, slots] or None. lengths: int32 [B], used slots.
    order: which rows of the target the slots hold. text_from: the first text token's id, on all axes, or None: all are
    0. cache: rotated keys and values by (branch, layer), of [text | slots], or None to keep none. first: the call
    brings the first so many slots alone, and attends to the others' cached ones.
    """

    ids: Tensor
    key_bias: Tensor | None
    lengths: Tensor
    order: SequenceLayout
    text_from: int | None
    cache: dict[Hashable, tuple[Tensor, Tensor]] | None
    first: int | None = None

    @property
    def slots(self) -> int:
        """Image slots that a call brings."""
        return self.ids.shape[1]


class MixedAttention:
    """The host's `optimized_attention_override` for one forward on a mixed sequence [text | image slots].

    branches: one name for each guidance branch that the batch holds, in order. references: whether these see them.
    """

    def __init__(self, layout: MixedLayout, branches: Sequence[Hashable], references: bool):
        self.layout = layout
        self.branches = branches
        self.references = references
        self.layer = 0

    def _of_all(self, x: Tensor) -> Tensor:
        return x.repeat(len(self.branches), *[1] * (x.ndim - 1))

    def _key_bias(self, text: int) -> Tensor | None:
        layout = self.layout
        bias = layout.key_bias
        if not self.references:
            bias = torch.zeros(layout.order.index.shape, device=layout.ids.device) if bias is None else bias
            bias = bias.masked_fill(~layout.order.target_slots(), float("-inf"))
        return None if bias is None else self._of_all(F.pad(bias, (text, 0)))

    def _over_cache(self, text: int, fresh: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole sequence: cached ones, of which those of the fine target tokens are renewed."""
        layout = self.layout
        assert layout.cache is not None
        brought = fresh[0].shape[1]
        slot = torch.arange(brought, device=layout.ids.device)
        renewed = (slot < layout.order.fine_lengths[:, None] + text)[..., None, None]
        whole = []
        for name, *pair in zip(self.branches, *(x.chunk(len(self.branches)) for x in fresh)):
            kept = layout.cache[name, self.layer]
            for old, new in zip(kept, pair):
                old[:, :brought] = torch.where(renewed, new, old[:, :brought])
            whole.append(kept)
        k, v = (x[0] if len(x) == 1 else torch.cat(x) for x in zip(*whole))
        return k, v

    def __call__(
        self, function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None,
        attn_precision: Any = None, skip_reshape: bool = False, skip_output_reshape: bool = False, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        layout = self.layout
        rows = 2 if skip_reshape else 1
        text = q.shape[rows] - layout.slots
        if text < 0 or q.shape[rows] != k.shape[rows]:  # not the joint attention: another node's own
            return function(q, k, v, heads, mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
                            skip_output_reshape=skip_output_reshape, **kwargs)  # fmt: skip
        if mask is not None:
            raise ValueError("conditioning: attention masks do not fit a mixed-resolution sequence")
        q, k, v = (x.transpose(1, 2) if skip_reshape else x.unflatten(-1, (heads, -1)) for x in (q, k, v))
        used = keys = self._of_all(layout.lengths) + text
        if layout.first is not None:
            k, v = self._over_cache(text, (k, v))
            used = used.clamp(max=text + layout.first)
        elif layout.cache is not None:
            for name, *pair in zip(self.branches, *(x.chunk(len(self.branches)) for x in (k, v))):
                layout.cache[name, self.layer] = tuple(x.clone(memory_format=torch.contiguous_format) for x in pair)
        self.layer += 1
        out, _ = torch.ops.specedit.mixed_res_attn(q, k, v, key_bias=self._key_bias(text), q_lens=used, kv_lens=keys)
        return out.transpose(1, 2) if skip_output_reshape else out.flatten(2)


@dataclass(frozen=True)
class _Step:
    """What the wrapper has to know of the step that is under way. references: latents, of whole pictures."""

    layout: WholeLayout | MixedLayout
    batch: int
    references: list[Tensor]


class HostModel(EditModel):
    """A transformer of ComfyUI's under the guider of the graph.

    predict: clean latents for noisy ones, in the host's shape, at a sigma [B], with `wrapper` in place. method: how the
    host places several references. fine: what a step's clean estimate was at last, for a preview.
    """

    DEFAULT_METHOD: str

    def __init__(
        self, transformer: torch.nn.Module, codec: Any, predict: Callable[[Tensor, Tensor], Tensor],
        method: str | None = None,
    ):  # fmt: skip
        self.transformer = transformer
        self.codec = codec
        self.predict = predict
        self.method = self.DEFAULT_METHOD if method is None else method
        self.guidance = None  # the guider's
        self.attention_kwargs = {}
        self.fine: Tensor | None = None
        self._step: _Step | None = None
        if self.method not in METHODS:
            raise ValueError(f"reference_latents_method: expected one of {list(METHODS)}, got {self.method!r}")

    # what a model's class gives

    @classmethod
    def calibrated(cls) -> Mapping[tuple[str, str, str], Mapping[bool | str, float]]:
        """EditModel.thresholds of this model."""
        return {}

    @property
    def width(self) -> int:
        """Channels of a token."""
        raise NotImplementedError

    def _ids(self, positions: Tensor, pictures: Pictures) -> Tensor:
        """The host's ids for (picture, row, column), fp32 [rows, 3]."""
        raise NotImplementedError

    def _text_from(self, pictures: Pictures) -> int | None:
        raise NotImplementedError

    def _mixed_forward(
        self, executor: Any, call: inspect.BoundArguments, ids: Tensor, text_ids: Tensor, attention: MixedAttention
    ) -> Tensor:
        """The model's output for a mixed sequence that looks like a latent picture."""
        raise NotImplementedError

    # the stages' questions

    def embedder(self) -> torch.nn.Module:
        return self.transformer.img_in

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        raise NotImplementedError("the guider of the graph does it")

    def flops(self, text: Text, tokens: int, keys: int | None = None, lock_text: bool = False) -> int:
        length = text.embeds.shape[1]
        keys = length + (tokens if keys is None else keys)
        return transformer_flops(tokens if lock_text else length + tokens, keys, self.width, self.blocks)

    def dense_layout(self, text: Text, pictures: Pictures, grids: Sequence[Grid]) -> WholeLayout:
        return WholeLayout(tuple(grids))

    def watched_layout(self, text: Text, pictures: Pictures, grids: Sequence[Grid], watch: Any) -> WholeLayout:
        raise NotImplementedError("no method that watches the attention runs in ComfyUI")

    def mixed_layout(
        self, text: Text, pictures: Pictures, layout: SequenceLayout, key_bias: bool, cached: bool
    ) -> MixedLayout:
        positions = table_positions(pictures.target, layout.index.device, pictures.others, pictures.coarse_others)
        return MixedLayout(
            ids=in_order(self._ids(positions, pictures), layout),
            key_bias=key_bias_in_order(pictures, layout) if key_bias else None,
            lengths=layout.lengths,
            order=layout,
            text_from=self._text_from(pictures),
            cache={} if cached else None,
        )

    def active_layout(self, text: Text, layout: MixedLayout, first: int | None, lock_text: bool = False) -> MixedLayout:
        if lock_text or first is None:
            raise ValueError(
                "lock_text, coarse_text_refresh: expected False and 1, since ComfyUI's models compute the text in each"
                " call"
            )
        return replace(layout, ids=layout.ids[:, :first], first=first)

    def another_cache(self, layout: MixedLayout) -> MixedLayout:
        return replace(layout, cache={})

    def blend(self, layout: MixedLayout, near: MixedLayout, far: MixedLayout, weight: Tensor) -> None:
        assert layout.cache is not None and near.cache is not None and far.cache is not None
        for name, pair in near.cache.items():
            k, v = (torch.lerp(a, b, weight.to(a.dtype)) for a, b in zip(pair, far.cache[name]))
            layout.cache[name] = k, v

    def kv_bytes(self, layouts: Sequence[MixedLayout]) -> int:
        kept = (x for layout in layouts if layout.cache for pair in layout.cache.values() for x in pair)
        return sum(x.numel() * x.element_size() for x in kept)

    def velocity(self, text: Text, tokens: Tensor, conditioning: Tensor, layout: WholeLayout | MixedLayout) -> Tensor:
        """Of whole pictures, the target's alone: the host gives no velocity for its references."""
        sigma = conditioning / 1000
        if isinstance(layout, WholeLayout):
            parts = tokens.split([math.prod(grid) for grid in layout.grids], dim=1)
            noisy, *references = (unpack(part, grid) for part, grid in zip(parts, layout.grids))
        else:
            noisy, references = unpack(tokens, (layout.slots, 1)), []
        self._step = _Step(layout, len(tokens), references)
        try:
            clean = self.predict(self._host(noisy), sigma.expand(len(tokens))).reshape(noisy.shape)
        finally:
            self._step = None
        self._see(clean, layout)
        return pack((noisy - clean) / sigma)

    def _see(self, clean: Tensor, layout: WholeLayout | MixedLayout) -> None:
        if self.fine is None:
            return
        if isinstance(layout, MixedLayout):
            order, grid = layout.order, layout.order.grid
            if grid[0] * PATCH == self.fine.shape[-2]:
                index = torch.where(order.fine_target_slots(), order.index, -1)[:, : layout.slots].contiguous()
                seen = pack(self.fine).contiguous()
                ops.scatter_tokens_(seen, pack(clean).to(seen.dtype), index)
                self.fine = unpack(seen, grid)
                return
            clean = unpack(pack(clean)[:, : math.prod(grid)], grid)  # a coarse step that keeps keys and values
        self.fine = F.interpolate(clean, size=self.fine.shape[-2:])

    # within the host's call

    def wrapper(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """For the host's DIFFUSION_MODEL wrappers. Outside a step of the stages it does nothing."""
        step = self._step
        if step is None:
            return executor(*args, **kwargs)
        call = inspect.signature(executor.original).bind(*args, **kwargs)
        call.apply_defaults()
        x, references = call.arguments["x"], call.arguments.get("ref_latents")
        copies = x.shape[0] // step.batch
        if isinstance(step.layout, WholeLayout):
            if references is not None:  # a branch without them has none at any resolution
                call.arguments["ref_latents"] = [self._host(r).to(x).repeat(copies, *[1] * (x.ndim - 1))
                                                 for r in step.references]  # fmt: skip
            return executor(*call.args, **call.kwargs)
        layout, options = step.layout, dict(call.arguments["transformer_options"])
        branches = options.get("uuids") or options.get("cond_or_uncond") or range(copies)
        attention = MixedAttention(layout, list(branches), references is not None)
        options["optimized_attention_override"] = attention
        call.arguments["transformer_options"] = options
        ids = attention._of_all(layout.ids)
        length = call.arguments["context"].shape[1]
        if layout.text_from is None:
            text_ids = ids.new_zeros(length)
        else:
            text_ids = torch.arange(length, device=ids.device, dtype=ids.dtype) + layout.text_from
        text_ids = text_ids[None, :, None].expand(len(ids), length, 3)
        return self._mixed_forward(executor, call, ids, text_ids, attention)

    def _host(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] in the shape that the host gives the model."""
        return latents


def reference_places(references: Sequence[Grid], method: str) -> list[tuple[int, int, int]]:
    """(id on the first axis, row, column) where each reference begins, in tokens.

    "index": each has an id of its own. "offset": all have 1, and are placed beside or under one another.
    """
    if method == "index":
        return [(i + 1, 0, 0) for i in range(len(references))]
    places, height, width = [], 0, 0
    for rows, columns in references:
        beside = rows + height > columns + width
        row, column = (0, width) if beside else (height, 0)
        places.append((1, row, column))
        height, width = max(height, row + rows), max(width, column + columns)
    return places


class HostFlux(HostModel):
    """comfy.ldm.flux.model.Flux: FLUX.1-Kontext."""

    DEFAULT_METHOD = "offset"

    @property
    def blocks(self) -> int:
        return len(self.transformer.double_blocks) + len(self.transformer.single_blocks)

    @property
    def width(self) -> int:
        return self.transformer.hidden_size

    def _ids(self, positions: Tensor, pictures: Pictures) -> Tensor:
        places = [(0, 0, 0), *reference_places(pictures.references, self.method)]
        begin = torch.tensor(places, dtype=torch.float32, device=positions.device)
        return begin[positions[:, 0].long()] + F.pad(positions[:, 1:], (1, 0))

    def _text_from(self, pictures: Pictures) -> None:
        return None

    def _mixed_forward(
        self, executor: Any, call: inspect.BoundArguments, ids: Tensor, text_ids: Tensor, attention: MixedAttention
    ) -> Tensor:
        given, further = call.arguments, call.arguments.get("kwargs", {})
        if further.get("attention_mask") is not None:
            raise ValueError("conditioning: attention masks do not fit a mixed-resolution sequence")
        out = executor.class_obj.forward_orig(
            img=pack(given["x"]),
            img_ids=ids,
            txt=given["context"],
            txt_ids=text_ids,
            timesteps=given["timestep"],
            y=given["y"],
            guidance=given["guidance"],
            transformer_options=given["transformer_options"],
        )
        return unpack(out, (ids.shape[1], 1))


class HostQwen(HostModel):
    """comfy.ldm.qwen_image.model.QwenImageTransformer2DModel: Qwen-Image-Edit and -Edit-2509."""

    DEFAULT_METHOD = "index"

    @classmethod
    def calibrated(cls) -> Mapping[tuple[str, str, str], Mapping[bool | str, float]]:
        from specedit_kernels.models.qwen_image_edit import THRESHOLDS

        return THRESHOLDS

    @property
    def blocks(self) -> int:
        return len(self.transformer.transformer_blocks)

    @property
    def width(self) -> int:
        return self.transformer.inner_dim

    def _host(self, latents: Tensor) -> Tensor:
        return latents[:, :, None]

    def _ids(self, positions: Tensor, pictures: Pictures) -> Tensor:
        places = [(0, 0, 0), *reference_places(pictures.references, self.method)]
        # rows and columns count from a picture's centre
        grids = (pictures.target, *pictures.references)
        places = [(i, row - r // 2, column - c // 2) for (i, row, column), (r, c) in zip(places, grids)]
        begin = torch.tensor(places, dtype=torch.float32, device=positions.device)
        return begin[positions[:, 0].long()] + F.pad(positions[:, 1:], (1, 0))

    def _text_from(self, pictures: Pictures) -> int:
        return max(side // 2 for side in pictures.target)

    def _mixed_forward(
        self, executor: Any, call: inspect.BoundArguments, ids: Tensor, text_ids: Tensor, attention: MixedAttention
    ) -> Tensor:
        # The model makes its ids within its forward: they are replaced on their way to the rotary table.
        ids = torch.cat([text_ids, ids], dim=1)
        call.arguments["ref_latents"] = None
        hook = executor.class_obj.pe_embedder.register_forward_pre_hook(lambda module, args: (ids, *args[1:]))
        try:
            return executor(*call.args, **call.kwargs)
        finally:
            hook.remove()


def adapter_of(transformer: torch.nn.Module) -> type[HostModel]:
    """The adapter for a diffusion model of the host. TypeError for one that has none."""
    if isinstance(transformer, comfy.ldm.flux.model.Flux) and len(transformer.params.axes_dim) == 3:
        return HostFlux
    if isinstance(transformer, comfy.ldm.qwen_image.model.QwenImageTransformer2DModel):
        return HostQwen
    raise TypeError(
        f"model: SpecEdit runs FLUX.1-Kontext and Qwen-Image-Edit with ComfyUI's own model classes, got"
        f" {type(transformer).__name__}"
    )
