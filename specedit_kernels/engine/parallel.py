# SPDX-License-Identifier: Apache-2.0
"""One edit on several GPUs: which rank has which tokens, heads and guidance branch, and what the ranks exchange.

Ulysses sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509): a rank has some of the tokens where layers work on
tokens, and all tokens of some of the heads in attention. Two all-to-alls a block, of torch.distributed, lead from the
one to the other. Nothing here waits on the host for a number, so that NCCL's calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ._diffusers import context_parallel, ulysses_group


@dataclass(frozen=True)
class Ranks:
    """A process group, and which of its `size` ranks this process is.

    anything: lengths that `size` does not divide were allowed to the hooks of diffusers (`ulysses_anything`).
    """

    group: Any
    rank: int
    size: int
    anything: bool = False

    @classmethod
    def of(cls, group: Any, anything: bool = False) -> Ranks:
        return cls(group, dist.get_rank(group), dist.get_world_size(group), anything)

    def split(self, rows: int) -> list[int]:
        """How many of so many rows each rank has, the first ones first: as torch.tensor_split."""
        least, more = divmod(rows, self.size)
        return [least + (rank < more) for rank in range(self.size)]

    def bounds(self, rows: int) -> tuple[int, int]:
        """(first, end) of this rank's rows."""
        sizes = self.split(rows)
        first = sum(sizes[: self.rank])
        return first, first + sizes[self.rank]


def sequence_ranks(transformer: Any) -> Ranks | None:
    """The ranks that share a transformer's sequence (`enable_parallelism(config=ContextParallelConfig(...))`), or None.

    ValueError where they share it in a way that no run can serve.
    """
    config: Any = context_parallel(transformer)
    if config is None:
        return None
    if config.ring_degree > 1:
        raise ValueError(f"transformer: expected ring_degree=1 (Ulysses alone is supported), got {config.ring_degree}")
    ranks = Ranks.of(ulysses_group(config), config.ulysses_anything)
    heads = transformer.config["num_attention_heads"]
    if heads % ranks.size:
        raise ValueError(f"transformer: expected a ulysses_degree that divides its {heads} heads, got {ranks.size}")
    return ranks


@contextlib.contextmanager
def _exchange(ranks: Ranks) -> Iterator[None]:
    """What torch.distributed raises within is one line that says what it means."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RuntimeError(
            f"rank {dist.get_rank()}: another rank has ended, or did not answer in the time limit of the process group:"
            f" {reason}"
        ) from error


def _all_to_all(got: Tensor, sent: Tensor, rows_got: Sequence[int], rows_sent: Sequence[int], ranks: Ranks) -> None:
    """dist.all_to_all_single of rows; without their numbers where all are one, which NCCL sends as one."""
    uneven = len({*rows_got, *rows_sent}) > 1
    got_as, sent_as = (list(rows_got), list(rows_sent)) if uneven else (None, None)
    with _exchange(ranks):
        dist.all_to_all_single(got, sent, got_as, sent_as, group=ranks.group)


def to_heads(streams: Sequence[Sequence[Tensor]], sizes: Sequence[int], ranks: Ranks) -> list[Tensor]:
    """q, k and v of this rank's tokens -> those of all tokens for its heads, [B, sum(sizes), H / ranks, D] each.

    streams: q, k and v of the rank's tokens, [B, n, H, D] each, one stream after the other. sizes: tokens of each
    rank, in whose order all are.
    """
    dtype = streams[0][0].dtype
    for part in streams[0]:
        dtype = torch.promote_types(dtype, part.dtype)
    batch, _, heads, dim = streams[0][0].shape
    n, kinds, own = sizes[ranks.rank], len(streams[0]), heads // ranks.size
    sent = streams[0][0].new_empty(ranks.size, n, batch, kinds, own, dim, dtype=dtype)
    places = sent.split([stream[0].shape[1] for stream in streams], dim=1)
    for place, stream in zip(places, streams):
        for i, part in enumerate(stream):
            place[:, :, :, i].copy_(part.unflatten(2, (ranks.size, own)).permute(2, 1, 0, 3, 4))
    got = sent.new_empty(sum(sizes), batch, kinds, own, dim)
    _all_to_all(got, sent.flatten(0, 1), sizes, [n] * ranks.size, ranks)
    return [got[:, :, i].transpose(0, 1).to(part.dtype) for i, part in enumerate(streams[0])]


def to_tokens(x: Tensor, sizes: Sequence[int], ranks: Ranks) -> Tensor:
    """The way back: [B, sum(sizes), h, D] of this rank's heads -> [B, n, H * D] of its tokens."""
    batch, _, own, dim = x.shape
    n = sizes[ranks.rank]
    sent = x.transpose(0, 1).contiguous()
    got = sent.new_empty(ranks.size, n, batch, own, dim)
    _all_to_all(got.flatten(0, 1), sent, [n] * ranks.size, sizes, ranks)
    return got.permute(2, 1, 0, 3, 4).flatten(2)


def all_tokens(x: Tensor, sizes: Sequence[int], ranks: Ranks) -> Tensor:
    """[B, n, C] of this rank's tokens -> [B, sum(sizes), C] of all, on every rank. sizes: tokens of each rank."""
    most = max(sizes)
    sent = F.pad(x, (0, 0, 0, most - x.shape[1])).contiguous()
    got = [torch.empty_like(sent) for _ in sizes]
    with _exchange(ranks):
        dist.all_gather(got, sent, group=ranks.group)
    return torch.cat([part[:, :size] for part, size in zip(got, sizes)], dim=1)


def all_rows(x: Tensor, sizes: Sequence[int], ranks: Ranks) -> Tensor:
    """[B, C, ..., n, W] of this rank's rows -> the same of all, on every rank. sizes: rows of each rank."""
    rows = x.movedim(-2, 1)
    return all_tokens(rows.flatten(2), sizes, ranks).unflatten(2, rows.shape[2:]).movedim(1, -2).contiguous()


def beyond(x: Tensor, above: int, below: int, ranks: Ranks) -> Tensor:
    """A rank's rows [B, C, n, W] of a map whose rows the ranks have in order, with so many of the ranks before and
    after it, or zeros: [B, C, above + n + below, W]. n: at least as many, on every rank."""
    if not above and not below:
        return x
    batch, channels, n, width = x.shape
    first, last = ranks.rank == 0, ranks.rank == ranks.size - 1
    rows = x.permute(2, 0, 3, 1)  # channels last, as convolutions like them
    sent = torch.cat([rows[: 0 if first else below], rows[n - (0 if last else above) :]])
    rows_sent, rows_got = [0] * ranks.size, [0] * ranks.size
    if not first:
        rows_sent[ranks.rank - 1], rows_got[ranks.rank - 1] = below, above
    if not last:
        rows_sent[ranks.rank + 1], rows_got[ranks.rank + 1] = above, below
    got = sent.new_empty(sum(rows_got), batch, width, channels)
    _all_to_all(got, sent.contiguous(), rows_got, rows_sent, ranks)
    got = got.permute(1, 3, 0, 2)
    form = torch.channels_last if channels > 1 and x.stride(1) == 1 else torch.contiguous_format
    found = torch.empty((batch, channels, above + n + below, width), dtype=x.dtype, device=x.device, memory_format=form)
    found[:, :, above : above + n] = x
    upper = found[:, :, :above]
    lower = found[:, :, above + n :]
    if first:
        upper.zero_()
    else:
        upper.copy_(got[:, :, :above])
    if last:
        lower.zero_()
    else:
        lower.copy_(got[:, :, got.shape[2] - below :])
    return found


def of_each(x: Tensor, ranks: Ranks) -> list[Tensor]:
    """The tensors of all ranks, of one shape."""
    sent = x.contiguous()
    got = [torch.empty_like(sent) for _ in range(ranks.size)]
    with _exchange(ranks):
        dist.all_gather(got, sent, group=ranks.group)
    return got


def of_first(x: Tensor, ranks: Ranks) -> Tensor:
    """The tensor of the first rank, on every rank."""
    sent = x.clone(memory_format=torch.contiguous_format)
    with _exchange(ranks):
        dist.broadcast(sent, group=ranks.group, group_src=0)
    return sent


def texts_of_each(text: Any, device: torch.device, ranks: Ranks) -> list[Any]:
    """The texts of all ranks, on every rank: dataclasses of one class whose fields are tensors on a device, of any
    lengths, lists of such, or anything that pickles."""
    kind = type(text)
    own, form = tree_flatten({field.name: getattr(text, field.name) for field in fields(text)})
    own = [x.contiguous() if isinstance(x, Tensor) else x for x in own]
    sent = form, [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else _Plain(x) for x in own]
    said: list[Any] = [None] * ranks.size
    found = []
    with _exchange(ranks):
        dist.all_gather_object(said, sent, group=ranks.group)
        for rank, (form, leaves) in enumerate(said):
            values = []
            for i, leaf in enumerate(leaves):
                if isinstance(leaf, _Plain):
                    values.append(leaf.value)
                    continue
                x = own[i] if rank == ranks.rank else torch.empty(leaf[0], dtype=leaf[1], device=device)
                dist.broadcast(x, group=ranks.group, group_src=rank)
                values.append(x)
            found.append(kind(**tree_unflatten(values, form)))
    return found


@dataclass(frozen=True)
class _Plain:
    """What a text holds besides tensors."""

    value: Any
