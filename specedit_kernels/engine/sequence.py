# SPDX-License-Identifier: Apache-2.0
"""The sequence of one call of a transformer, and its attention: the same for the eager and the fused forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..sampling.layout import SequenceLayout
from ._diffusers import dispatch_attention
from .kv_cache import Fp8KV, KVCache, PackedKV
from .parallel import Ranks, all_tokens, to_heads, to_tokens


@dataclass
class TextWatch:
    """A record of how much of its attention each image query of one module gives to each text token.

    module: the attention module that is watched. mass: fp32 [B, image tokens, text tokens], softmax weight, mean over
    heads; None before the module was called.
    """

    module: Any
    mass: Tensor | None = None


@dataclass(frozen=True)
class MixedSequence:
    """The sequence of a call: `text` tokens, then image tokens; N tokens in all.

    cos, sin: fp32 [B or 1, N, D/2], rotary tables. key_bias: fp32 [B, keys] or None. queries, keys: int32 [B], how many
    of the tokens are queries and how many keys there are, None: all. rows: int32 [B, N], the row of the kept keys and
    values that each token writes, -1: none; None: row i by token i. Without text tokens those of the text stay as they
    were kept. span: (first, end) of the kept rows that the call attends to, None: all. text_at: the key of the first
    text token within these, after those of the image or 0.
    region: int32 [B, image tokens], which row of text_mask, bool [B, regions, text], says what text an image token
    sees; None: all see all. Text sees everything. watched: what attention the image gives to the text is asked for.
    passing: later calls recompute the keys and values of these tokens in any case, so packed ones need not be
    renewed. modulate: int32 [B, image tokens], which of two timesteps modulates an image token: 0 the step's, 1 that of
    clean pictures; None: all have one. backend: diffusers' name of the attention that the user asked for, for calls
    without lengths and bias.
    ranks: the ranks that share the sequence, None: one has it all. Each brings its own part of the tokens and attends
    for its own heads; all that is said here is of the whole sequence. by_stream: a rank's part is one of the text and
    one of the image, as the hooks of diffusers split them; else it is a part of [text | image].
    """

    text: int
    cos: Tensor
    sin: Tensor
    key_bias: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    rows: Tensor | None = None
    text_at: int = 0
    span: tuple[int, int] | None = None
    region: Tensor | None = None
    text_mask: Tensor | None = None
    watched: bool = False
    passing: bool = False
    modulate: Tensor | None = None
    backend: str | None = None
    ranks: Ranks | None = None
    by_stream: bool = False

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(text, image) tokens of each rank."""
        tokens = self.cos.shape[1]
        if self.ranks is None:
            return [(self.text, tokens - self.text)]
        if self.by_stream:
            return list(zip(self.ranks.split(self.text), self.ranks.split(tokens - self.text)))
        found, first = [], 0
        for size in self.ranks.split(tokens):
            text = min(first + size, self.text) - min(first, self.text)
            found.append((text, size - text))
            first += size
        return found

    @property
    def own(self) -> tuple[int, int]:
        """(text, image) tokens of this rank."""
        return self.parts[0 if self.ranks is None else self.ranks.rank]

    def own_text(self, x: Tensor) -> Tensor:
        """This rank's of x, [B, text tokens, ...]."""
        return x if self.ranks is None else x.split([text for text, _ in self.parts], dim=1)[self.ranks.rank]

    def own_image(self, x: Tensor) -> Tensor:
        """This rank's of x, [B, image tokens, ...]."""
        return x if self.ranks is None else x.split([image for _, image in self.parts], dim=1)[self.ranks.rank]

    def whole_image(self, x: Tensor) -> Tensor:
        """[B, this rank's image tokens, C] -> those of all ranks, on every rank."""
        return x if self.ranks is None else all_tokens(x, [image for _, image in self.parts], self.ranks)


def _packed(x: Tensor) -> Tensor:
    """x.contiguous(), with the strides of its own shape: those of a lone sample's slice would stay the whole's, and
    torch.compile guards on them."""
    return x.clone(memory_format=torch.contiguous_format)


# Keys and values of a block that outlive a step, [B, keys, H, D] each. Tensors of their own: torch.compile takes views
# of one tensor at several offsets for views at the first of them.
Kept = tuple[Tensor, Tensor] | PackedKV | Fp8KV


@dataclass(frozen=True)
class StepLayout:
    """A call's sequence, and where its keys and values are kept.

    fresh: int32 [B], the tokens that an active step computes, text included; None where there is no such step.
    cache: the keys and values of each block that outlive the call, None to keep none: a KVCache for the transformer's
    own forward, a list for a fused one, with `buffers`, the runner's name for them, and `like`, a tensor [B, ...] of
    the dtype and on the device of the tokens.
    watch: a module's attention to the text is recorded there. start: text tokens that the call leaves out, the first
    ones: their keys and values are kept ones.
    """

    sequence: MixedSequence
    fresh: Tensor | None = None
    cache: Any = None
    buffers: str = ""
    like: Tensor | None = None
    watch: TextWatch | None = None
    start: int = 0

    def active(self, text: int, first: int | None, lock_text: bool = False, least_text: int = 0) -> StepLayout:
        """The layout of a call that brings the first so many image tokens, None: all, and the `text` text tokens.

        lock_text: of the text it brings the last `least_text` tokens alone, and renews none. Of each sample the first
        `fresh` tokens are computed.
        """
        whole = self.sequence
        start = text - least_text if lock_text else 0
        end = whole.cos.shape[1] if first is None else text + first
        fresh = whole.queries if first is None else self.fresh
        assert fresh is not None
        token = torch.arange(start, end, dtype=torch.int32, device=whole.cos.device)
        own = token < fresh[:, None]
        if lock_text and least_text:
            own = own & (token >= text)
        sequence = replace(
            whole,
            text=text - start,
            cos=whole.cos[:, start:end],
            sin=whole.sin[:, start:end],
            queries=fresh - start,
            rows=torch.where(own, token + (whole.span[0] if whole.span else 0), -1),
            passing=first is not None,
            region=None if whole.region is None else _packed(whole.region[:, : end - text]),
            modulate=None if whole.modulate is None else _packed(whole.modulate[:, : end - text]),
        )
        return replace(self, sequence=sequence, start=start)


def mixed_step_layout(
    text: int, tables: tuple[Tensor, Tensor], layout: SequenceLayout, key_bias: Tensor | None,
    cache: KVCache | None = None, **more: Any,
) -> StepLayout:  # fmt: skip
    """The layout of a mixed sequence with `text` text tokens.

    tables: cos and sin as diffusers has them, fp32 [B or 1, N, D], each value twice. more: further fields of the
    sequence.
    """
    cos, sin = (x[..., ::2].contiguous() for x in tables)
    used = layout.lengths + text
    return StepLayout(MixedSequence(text, cos, sin, key_bias, used, used, **more), layout.fine_lengths + text, cache)


def whole_step_layout(
    text: int, tables: tuple[Tensor, Tensor], batch: int, key_bias: Tensor | None = None,
    watch: TextWatch | None = None,
) -> StepLayout:  # fmt: skip
    """The layout of whole pictures with attention of our own, of which no slot is empty. tables: as above."""
    cos, sin = (x[..., ::2].contiguous() for x in tables)
    used = torch.full((batch,), cos.shape[1], dtype=torch.int32, device=cos.device)
    return StepLayout(MixedSequence(text, cos, sin, key_bias, used, used), watch=watch)


def embedded(
    of_text: Callable[[Tensor], Tensor], of_image: Callable[[Tensor], Tensor], embeds: Tensor, tokens: Tensor,
    sequence: MixedSequence,
) -> Tensor:  # fmt: skip
    """This rank's text and image tokens through their embedders, [B, n, C]."""
    pairs = (of_text, sequence.own_text(embeds)), (of_image, sequence.own_image(tokens))
    found = [layer(x) for layer, x in pairs if x.shape[1]]
    return torch.cat(found, dim=1) if len(found) > 1 else found[0]


def all_heads(streams: Sequence[Sequence[Tensor]], sequence: MixedSequence) -> list[Tensor]:
    """q, k and v of all tokens [text | image], for this rank's heads: [B, N, h, D] each.

    streams: q, k and v of this rank's tokens, [B, n, H, D] each, one stream after the other.
    """
    ranks, parts = sequence.ranks, sequence.parts
    if ranks is None:
        return [torch.cat(x, dim=1) if len(x) > 1 else x[0] for x in zip(*streams)]
    found = to_heads(streams, [sum(part) for part in parts], ranks)
    if not sequence.by_stream:
        return found
    pieces = [x.split([size for part in parts for size in part], dim=1) for x in found]
    return [torch.cat([*x[::2], *x[1::2]], dim=1) for x in pieces]


def own_tokens(x: Tensor, sequence: MixedSequence) -> Tensor:
    """The way back: [B, N, h, D] of this rank's heads -> [B, n, H * D] of its tokens."""
    ranks, parts = sequence.ranks, sequence.parts
    if ranks is None:
        return x.flatten(2)
    if sequence.by_stream:
        streams = (y.split(list(of), dim=1) for y, of in zip(x.tensor_split([sequence.text], dim=1), zip(*parts)))
        x = torch.cat([piece for pair in zip(*streams) for piece in pair], dim=1)
    return to_tokens(x, [sum(part) for part in parts], ranks)


class Stream(NamedTuple):
    """Tokens of a block whose layers and norms are the same, those `at` a slice of the sequence.

    qkv: [B, n, H, D] each, as the layers give them, those of this rank's tokens alone; none where it has none of them.
    norm_q, norm_k: RMSNorm modules.
    """

    at: slice
    qkv: Sequence[Tensor]
    norm_q: Any
    norm_k: Any


def attention(streams: Sequence[Stream], kept: Kept | None, sequence: MixedSequence) -> tuple[Tensor, Tensor | None]:
    """A block's attention [B, n, H * D] from where its layers gave q, k and v, and what `watched_mass` does.

    streams: all of the sequence, in order. kept: where its keys and values go, None to forget them.
    """
    if sequence.ranks is not None:
        whole = all_heads([x.qkv for x in streams if x.qkv], sequence)
        streams = [x._replace(qkv=[y[:, x.at] for y in whole]) for x in streams]
    like = streams[0].qkv[0]
    tokens = sum(x.qkv[0].shape[1] for x in streams)
    shape = (like.shape[0], tokens, *like.shape[2:])
    scales: tuple[Tensor, ...] = ()
    every = sequence.rows
    if isinstance(kept, Fp8KV):
        q, (k, v), scales = torch.empty(shape, dtype=kept.k.dtype, device=like.device), kept[:2], kept.scales
        if every is None:
            kept.set_scales_(streams)
            # of panels a part of the sequence has no view
            every = torch.arange(tokens, dtype=torch.int32, device=like.device).expand(like.shape[0], -1)
    else:
        q = like.new_empty(shape)
        k, v = places(q, kept, sequence)
    write: Any = ops.qk_norm_rope_scatter_fp8_ if scales else ops.qk_norm_rope_scatter_
    for at, qkv, norm_q, norm_k in streams:
        rows = None if every is None else every[:, at]
        k_out, v_out = (y[:, at] if rows is None else y for y in (k, v))
        write(
            q[:, at], k_out, v_out, *qkv, *scales, sequence.cos[:, at], sequence.sin[:, at],
            q_weight=norm_q.weight, k_weight=norm_k.weight, kv_out_index=rows, eps=norm_q.eps,
        )  # fmt: skip
    if isinstance(kept, Fp8KV):
        bias, lens = sequence.key_bias, dict(q_lens=sequence.queries, kv_lens=sequence.keys)
        out = ops.mixed_res_attn_fp8(q, k, v, *scales, key_bias=bias, **lens)[0]
        return own_tokens(out.to(like.dtype), sequence), None
    renew(kept, sequence)
    return attend(q, k, v, sequence), watched_mass(q, k, v, sequence)


def places(q: Tensor, kept: tuple[Tensor, Tensor] | PackedKV | None, sequence: MixedSequence) -> tuple[Tensor, Tensor]:
    """Where a block writes its keys and values and reads all: `kept`, [B, keys, H, D], or new ones like q."""
    if kept is None:
        return torch.empty_like(q), torch.empty_like(q)
    if isinstance(kept, PackedKV):
        if sequence.rows is not None:  # else all of them are written
            kept.load()
        k, v = kept.scratch
        return k, v
    return kept


def renew(kept: tuple[Tensor, Tensor] | PackedKV | None, sequence: MixedSequence) -> None:
    """Call when a block's keys and values are written."""
    if isinstance(kept, PackedKV) and not sequence.passing:
        kept.store()


def attend(q: Tensor, k: Tensor, v: Tensor, sequence: MixedSequence) -> Tensor:
    """Attention [B, n, H * D] of this rank's tokens. q: rotated, [B, N, h, D]; k, v: all kept rows, [B, rows, h, D]."""
    if sequence.span is not None:
        k, v = (x[:, sequence.span[0] : sequence.span[1]] for x in (k, v))
    if sequence.region is not None:
        out = _attend_by_region(q, k, v, sequence)
    elif sequence.key_bias is None and sequence.keys is None and sequence.backend is not None:
        out = dispatch_attention(q, k, v, sequence.backend)
    elif sequence.key_bias is None and sequence.keys is None:
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(heads[0], heads[1], heads[2]).transpose(1, 2)
    else:
        out = ops.mixed_res_attn(
            q, k, v, key_bias=sequence.key_bias, q_lens=sequence.queries, kv_lens=sequence.keys
        )[0]  # fmt: skip
    return own_tokens(out, sequence)


def _attend_by_region(q: Tensor, k: Tensor, v: Tensor, sequence: MixedSequence) -> Tensor:
    """Joint attention whose image -> text part is sparse (SSCA, FlashEdit, arXiv 2509.22244): [B, N, H, D].

    Image -> image is dense, image -> text goes by the tokens' regions, and merge_attn makes one softmax of the two;
    text attends to everything.
    """
    bias, queries, keys, text_mask = sequence.key_bias, sequence.queries, sequence.keys, sequence.text_mask
    assert text_mask is not None
    n, at = text_mask.shape[-1], sequence.text_at
    text, image = slice(at, at + n), slice(0, at) if at else slice(n, None)
    of_text = ops.mixed_res_attn(q[:, :n], k, v, key_bias=bias, kv_lens=keys)[0]
    of_image = ops.mixed_res_attn(
        q[:, n:], k[:, image], v[:, image],
        key_bias=None if bias is None else bias[:, image].contiguous(),
        q_lens=None if queries is None else queries - n,
        kv_lens=None if keys is None else keys - n,
    )  # fmt: skip
    sparse = ops.sparse_cross_attn(q[:, n:], k[:, text], v[:, text], sequence.region, text_mask)
    return torch.cat([of_text, ops.merge_attn(*of_image, *sparse)[0]], dim=1)


def text_mass(q: Tensor, k: Tensor, v: Tensor, sequence: MixedSequence) -> Tensor:
    """Softmax weight that image queries give to the text, the first keys, mean over heads: fp32 [B, image, text].

    Of one rank that has all tokens.
    """
    text = sequence.text
    lse = ops.mixed_res_attn(q, k, v, key_bias=sequence.key_bias, kv_lens=sequence.keys)[1]
    with torch.autocast(q.device.type, enabled=False):
        score = torch.einsum("bqhd,bkhd->bhqk", q[:, text:].float(), k[:, :text].float())
    return (score * q.shape[-1] ** -0.5 - lse[:, :, text:, None]).exp().mean(dim=1)


def watched_mass(q: Tensor, k: Tensor, v: Tensor, sequence: MixedSequence) -> Tensor | None:
    """`text_mass` where it is asked for."""
    return text_mass(q, k, v, sequence) if sequence.watched else None
