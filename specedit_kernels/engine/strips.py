# SPDX-License-Identifier: Apache-2.0
"""An autoencoder on several ranks: each computes a strip of rows of every map, of encoder and decoder.

A convolution gets the rows that it needs beyond its strip from the ranks above and below, a group norm has the
statistics of the whole map, attention the keys and values of all strips: what one rank computes, but for the order of
sums. Strips end where the coarsest map's rows do, so all maps are shared out alike.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from . import wide_attention
from ._diffusers import each_module, foreign_forward, hooked, mirrored, mirrors
from .feature_maps import padded_behind
from .parallel import Ranks, all_rows, all_tokens, beyond, of_each


class Strips:
    """How the rows of all maps are shared out, while one call of an encoder or a decoder runs.

    rows: of each rank, of the coarsest map.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.rows: list[int] = []
        self._shares = torch.empty(0, dtype=torch.float32)

    def begin(self, rows: int, device: torch.device) -> None:
        """Share out so many rows."""
        self.rows = self.ranks.split(rows)
        # filled on the device: a graph may be captured, which takes no numbers from the host
        shares = torch.full((self.ranks.size, 1, 1), self.rows[-1] / rows, dtype=torch.float32, device=device)
        shares[: self.rows.count(self.rows[-1] + 1)] = (self.rows[-1] + 1) / rows
        self._shares = shares

    def counts(self, own: int) -> list[int]:
        """How many rows each rank has of a map of which this one has so many; of any unit that follows rows."""
        return [own * rows // self.rows[self.ranks.rank] for rows in self.rows]

    def statistics(self, x: Tensor, groups: int, x_bias: Tensor | None = None) -> Tensor:
        """`ops.group_norm_statistics` of the map that x is this rank's strip of."""
        own = ops.group_norm_statistics(x, groups, x_bias=x_bias)
        means, variances = torch.stack(of_each(own, self.ranks)).unbind(1)
        mean = (self._shares * means).sum(0)
        return torch.stack([mean, (self._shares * (variances + (means - mean).square())).sum(0)])


def norm_of_map(
    norm: torch.nn.GroupNorm, strips: Strips, x: Tensor, silu: bool = False, x_bias: Tensor | None = None
) -> Tensor:
    """The group norm of a map on its strip x [B, C, h, W] or [B, C, N], and a SiLU. x_bias: of the convolution before,
    [C]."""
    of_all = strips.statistics(x, norm.num_groups, x_bias)
    return ops.group_norm(
        x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, silu=silu, statistics=of_all, x_bias=x_bias
    )


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, groups: int, strips: Strips
) -> Tensor:
    """The convolution of a map, of its strip x [B, C, h, W]. padding: rows above, columns at both sides.

    Rows that the map lacks are zeros: above it so many as `padding` says, below it what the last step of the kernel
    needs.
    """
    below = weight.shape[-2] - stride[0] - padding[0]
    x = beyond(x, padding[0], below, strips.ranks)
    return F.conv2d(x, weight, bias, stride, (0, padding[1]), groups=groups)


def plain_conv(conv: torch.nn.Conv2d) -> bool:
    """Whether `conv2d` serves a convolution: zeros about its map, and no more rows beyond a strip than a strip has."""
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros" or conv.dilation != (1, 1):
        return False
    below = conv.kernel_size[0] - conv.stride[0] - conv.padding[0]
    return conv.padding[0] in (0, 1) and below in (0, 1) and conv.stride[0] in (1, 2)


def conv2d(conv: torch.nn.Conv2d, strips: Strips, x: Tensor) -> Tensor:
    return convolved(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.groups, strips)


def unbiased_conv2d(conv: torch.nn.Conv2d, strips: Strips, x: Tensor) -> Tensor:
    return convolved(x, conv.weight, None, conv.stride, conv.padding, conv.groups, strips)


def biased_conv2d(conv: torch.nn.Conv2d, strips: Strips, x: Tensor) -> Tensor:
    y = unbiased_conv2d(conv, strips, x)
    assert conv.bias is not None
    ops.add_bias_(y, conv.bias)
    return y


def pads_behind(pad: Any, strips: Strips, x: Tensor) -> Tensor:
    """ZeroPad2d((0, 1, 0, 1)) before a convolution, which adds the row below itself."""
    return padded_behind(x, 0)


def downsample(module: Any, strips: Strips, x: Tensor, *unused: Any) -> Tensor:
    """diffusers' Downsample2D with a convolution and no padding of it."""
    return module.conv(padded_behind(x, 0))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, strips: Strips) -> Tensor:
    """Attention of q [B, n, C] of this rank's strip to keys and values of all strips; k, v: its own, [B, n, C]."""
    counts = strips.counts(q.shape[1])
    k, v = all_tokens(torch.cat([k, v], dim=-1), counts, strips.ranks).chunk(2, dim=-1)
    return wide_attention.of_heads(q, k, v, heads)


def attention(attn: Any, strips: Strips, x: Tensor, **unused: Any) -> Tensor:
    """diffusers' Attention of an autoencoder, on its strip x [B, C, h, W] of a map."""
    return wide_attention.of_map(attn, x, lambda q, k, v: attend(q, k, v, attn.heads, strips))


class Kind(NamedTuple):
    """What strips make of a class of modules: its forward on a strip, None: its own; which of them that serves."""

    forward: Callable[..., Tensor] | None = None
    serves: Callable[[Any], bool] = lambda module: True


class _Shared(torch.nn.Module):
    """Stands for an encoder or a decoder: whole maps in, the same out.

    unit: rows of its input for one of its coarsest map. on_strip: its tree of modules that compute a strip.
    """

    def __init__(self, whole: torch.nn.Module, on_strip: torch.nn.Module, strips: Strips, unit: int):
        super().__init__()
        self.whole = whole
        self.on_strip = on_strip
        self.strips = strips
        self.unit = unit

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows, left = divmod(x.shape[-2], self.unit)
        ranks = self.strips.ranks
        if left or rows < ranks.size:  # too low for a row each
            return self.whole(x, *args, **kwargs)
        self.strips.begin(rows, x.device)
        first, end = ranks.bounds(rows)
        found = self.on_strip(x[..., first * self.unit : end * self.unit, :], *args, **kwargs)
        return all_rows(found, self.strips.counts(found.shape[-2]), ranks)


def known(part: Any, kinds: Mapping[type, Kind]) -> bool:
    """Whether all modules of an encoder or a decoder are of these kinds that serve, and nothing but their class's
    forward."""
    for module in each_module(part):
        module = mirrors(module)  # a twin may have a forward of ours
        kind = kinds.get(type(module))
        if kind is None or not kind.serves(module) or foreign_forward(module) or hooked(vars(module), frozenset()):
            return False
    return True


def _on_strip(part: torch.nn.Module, kinds: Mapping[type, Kind], strips: Strips) -> torch.nn.Module:
    twin = mirrored(part)
    module: Any
    for module in each_module(twin):
        forward = kinds[type(module)].forward
        if forward is not None:
            module.forward = functools.partial(forward, module, strips)
    return twin


def _halvings(part: torch.nn.Module) -> int:
    """How often an encoder halves its maps: 2-d convolutions of stride 2 along its path."""
    return sum(isinstance(module, torch.nn.Conv2d) and module.stride[0] == 2 for module in each_module(part))


def over(codec: Any, ranks: Ranks | None) -> Any:
    """The codec with an autoencoder whose encoder and decoder are shared out over ranks: a tree of modules of its own
    over the same weights. The codec itself where there is one rank, or it names no kinds (`STRIPS`).

    An encoder or a decoder with a module of any other kind, with a hook or with a forward of its own, runs whole.
    """
    kinds = getattr(codec, "STRIPS", None)
    if ranks is None or ranks.size == 1 or not kinds:
        return codec
    shared, root = copy.copy(codec), copy.copy(codec.vae)
    shared.vae = root
    vars(root)["_modules"] = dict(vars(root)["_modules"])
    for name in ("encoder", "decoder"):
        part = getattr(root, name)
        if known(part, kinds):
            strips = Strips(ranks)
            unit = 2 ** _halvings(part) if name == "encoder" else 1
            setattr(root, name, _Shared(part, _on_strip(part, kinds, strips), strips, unit))
    return shared
