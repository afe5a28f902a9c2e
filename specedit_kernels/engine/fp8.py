# SPDX-License-Identifier: Apache-2.0
"""Linear layers in fp8: e4m3 weights with a scale for each output, activations with a scale for each row; and where
attention is in fp8 too.

`precision="fp8"` makes this hold within a run of a fused forward, for the layers that it asks for (`modulated`,
`linear` and `hidden` in fused.py): those of the blocks. A layer's weight is converted at its first use, and under a
low-rank change the changed weight; the model keeps its own, so that LoRA files, disable_specedit() and runs in the
model's own dtype work as before. On a CPU the same numbers are multiplied in fp32: slow, for tests and for measuring
quality.

A weight that torchao keeps in e4m3 is a factor as it lies, without a copy. Where its own call quantises activations too
(fp8 dynamic) it is one under `precision="auto"` as well, since that is what the checkpoint asks for: by row here, by
row or tensor there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import ops
from ._diffusers import each_module, foreign_forward, hooked, is_wrapper
from .low_rank import OWN_HOOKS, LowRankChange, active_change
from .quantised import Quantised, quantised

# torch._scaled_mm adds products up in the tensor core's own registers, of some 14 bits on sm_90, without bringing them
# to fp32 now and then. Beside what rounding to e4m3 takes (2^-4 of each factor) that is little; bench/kernels/fp8.py
# has both.
FAST_ACCUMULATION = True
MULTIPLE = 16  # of both sides of a weight: what torch._scaled_mm takes
ATTENTION_DIM = 128  # of a head: what the CUDA kernel of attention in e4m3 takes
_SAMPLED = 64  # elements of a weight that tell whether it was written in place


class Rows(NamedTuple):
    """Activations as `ops.quantize_fp8` gives them. values: e4m3 [..., K]; scale: fp32 [..., 1]."""

    values: Tensor
    scale: Tensor


class Factor(NamedTuple):
    """What rows are multiplied with. weight: e4m3 [N, K]. scale: fp32 [1, N]. bias: [N] or None. dtype: of the
    result."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    dtype: torch.dtype


@dataclass(frozen=True)
class _Packed:
    """A copy. factor: weights of layers that take the same rows, concatenated. looked: `Written.look`'s of then."""

    factor: Factor
    looked: Looked


class _OfRows(NamedTuple):
    """One scale of a whole weight, `source`, and the same for each output, [1, N]: what the product takes."""

    source: Tensor
    place: int
    scale: Tensor


def _parts(layers: Iterable[Any]) -> list[Tensor]:
    found = []
    for layer in layers:
        own = vars(layer)["_parameters"]  # a module takes long to find what is no attribute
        weight, bias = (own[name] if name in own else getattr(layer, name) for name in ("weight", "bias"))
        found += [weight] if bias is None else [weight, bias]
    return found


def places(layers: Iterable[Any]) -> list[int]:
    """Addresses of the weights and biases of linear layers."""
    return [x.data_ptr() for x in _parts(layers)]


def _versions(parts: Iterable[Tensor]) -> list[int]:
    """torch's counters of writes in place, which those through `.data` do not count in."""
    return [0 if x.is_inference() else x._version for x in parts]


@torch.no_grad()
def _sample(parts: Iterable[Tensor]) -> Tensor:
    """From the middle of each weight and bias. Side by side: elements apart are no fast path of torch.cat."""
    found = []
    for x in parts:
        x = x if x.is_contiguous() else x.contiguous()
        middle = x.numel() // 2
        found.append(x.as_strided((min(_SAMPLED, x.numel() - middle),), (1,), x.storage_offset() + middle))
    return torch.cat(found)


class Looked(NamedTuple):
    """Of layers' weights when they were looked at. at: their addresses. versions: `_versions`. sample: some of their
    elements."""

    at: list[int]
    versions: list[int]
    sample: Tensor


class Written:
    """Whether weights were written in place since they were looked at, however many copies are made of each.

    Any write that torch counts is seen. One that it does not (through `.data`, as PEFT merges adapters, or from outside
    of torch, and any to tensors of inference mode) is seen by 64 elements from the middle of each weight, so a change
    of all of it is, and one of a part may not be: to read all weights takes 8 ms for 24 GB on an H200, in each call.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[torch.nn.Module, ...], Looked] = {}
        self._joined: tuple[list[Looked], Tensor] | None = None  # samples of these, one after another

    def look(self, layers: tuple[torch.nn.Module, ...], at: list[int]) -> Looked:
        """A copy is made of these layers' weights, which lie `at` these places."""
        if layers not in self._seen or self._seen[layers].at != at:
            parts = _parts(layers)
            self._seen[layers] = Looked(at, _versions(parts), _sample(parts))
        return self._seen[layers]

    def serves(self, looked: Looked, layers: tuple[torch.nn.Module, ...], at: list[int]) -> bool:
        """Whether a copy made at that look is one of weights that lie `at` these places and are looked after. Weights
        that others replaced for a while, and that are back, are not."""
        return looked.at == at and self._seen.get(layers) is looked

    def found(self) -> bool:
        """Whether one was. Those that lie elsewhere now do not count. Waits for the device, once."""
        there: list[Looked] = []
        now: list[Tensor] = []
        for layers, looked in self._seen.items():
            parts = _parts(layers)
            if looked.at == [x.data_ptr() for x in parts]:
                if looked.versions != _versions(parts):
                    return True
                there.append(looked)
                now += parts
        if not there:
            return False
        joined = self._joined
        if joined is None or len(joined[0]) != len(there) or any(a is not b for a, b in zip(joined[0], there)):
            joined = self._joined = there, torch.cat([looked.sample for looked in there])
        return not torch.equal(_sample(now), joined[1])

    def clear(self) -> None:
        self._seen.clear()
        self._joined = None


def _refuses(layers: Sequence[Any]) -> str:
    """Why these layers cannot compute in fp8, or ""."""
    for layer in layers:
        if type(layer) is not torch.nn.Linear:
            return f"a {type(layer).__name__} is more than a weight and a bias"
        weight = layer.weight
        if is_wrapper(weight) or not weight.is_floating_point() or weight.element_size() < 2:
            return f"a weight is a {type(weight).__name__} of {weight.dtype}"
        if weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE:
            return f"a weight of {list(weight.shape)} is not in multiples of {MULTIPLE}"
        if weight.is_cuda and weight.dtype != torch.bfloat16:
            return f"weights are {weight.dtype}, and products in fp8 give torch.bfloat16"
        if (weight.dtype, weight.device, layer.bias is None) != (
            layers[0].weight.dtype, layers[0].weight.device, layers[0].bias is None
        ):  # fmt: skip
            return "layers with the same input differ in dtype, device or bias"
    return ""


def _in_place(layer: Any, every: bool) -> Quantised | None:
    """The weight of a layer that is a factor as it lies. every: also where its own call has activations as they are."""
    found = quantised(layer)
    if found is None or found.data.dtype != torch.float8_e4m3fn or not (every or found.dynamic):
        return None
    if found.data.shape[0] % MULTIPLE or found.data.shape[1] % MULTIPLE:
        return None
    return None if found.data.is_cuda and layer.weight.dtype != torch.bfloat16 else found


def asked_by(transformer: torch.nn.Module) -> bool:
    """Whether a layer's own call quantises its activations, so that it computes in fp8 without being asked to."""
    return any(type(x) is torch.nn.Linear and _in_place(x, every=False) for x in each_module(transformer))


_Copies = dict[tuple[torch.nn.Module, ...], _Packed]


class Fp8Linears:
    """Converted weights of a transformer's layers. refused: {why layers compute as they are: these layers}.

    A low-rank change that is active is within the copies, of which each change has its own, as long as it lives. It is
    not in weights that are factors as they lie: their layers are called under it.
    """

    def __init__(self) -> None:
        self._own: _Copies = {}
        self._changed: WeakKeyDictionary[LowRankChange, _Copies] = WeakKeyDictionary()
        self._scales: WeakKeyDictionary[torch.nn.Module, _OfRows] = WeakKeyDictionary()
        self._written = Written()
        self.refused: dict[str, set[torch.nn.Module]] = {}

    def _all(self) -> list[tuple[tuple[torch.nn.Module, ...], _Packed]]:
        return [pair for copies in (self._own, *self._changed.values()) for pair in copies.items()]

    @property
    def bytes(self) -> int:
        """Memory of the copies, and of scales for each output where a weight has one for all."""
        copies = [x for _, p in self._all() for x in p.factor[:3] if x is not None]
        copies += [x.scale for x in self._scales.values()]
        return sum(x.numel() * x.element_size() for x in copies)

    def of(self, layers: tuple[torch.nn.Module, ...], every: bool = True) -> list[Factor] | None:
        """The factors of layers that take the same rows: one for all, or one each where a weight is one as it lies.

        None where one of them is refused. every: not only layers that ask for it themselves.
        """
        own = [_in_place(layer, every) for layer in layers]
        if active_change() is not None or not any(own):
            return self._copies(layers) if every else None
        factors: list[Factor] = []
        for layer, weight in zip(layers, own):
            found = [self._factor(layer, weight)] if weight else self._copies((layer,)) if every else None
            if found is None:
                return None
            factors += found
        return factors

    def _factor(self, layer: Any, weight: Quantised) -> Factor:
        """A weight as it lies. Nothing of it is kept, or offloading could not free it."""
        scale = weight.scale.view(1, -1)
        if scale.shape[1] != len(weight.data):
            kept = self._scales.get(layer)
            if kept is None or kept.place != weight.scale.data_ptr():
                of_rows = scale.expand(1, len(weight.data)).contiguous()
                kept = self._scales[layer] = _OfRows(weight.scale, weight.scale.data_ptr(), of_rows)
            scale = kept.scale
        bias = None if layer.bias is None else layer.bias.detach()
        return Factor(weight.data, scale, bias, layer.weight.dtype)

    def _copies(self, layers: tuple[torch.nn.Module, ...]) -> list[Factor] | None:
        """The copy of layers, made where there is none."""
        change = active_change()
        copies = self._own if change is None else self._changed.setdefault(change, {})
        found, reason = copies.get(layers), ""
        if any(hooked(vars(layer), OWN_HOOKS) or foreign_forward(layer) for layer in layers):
            reason = "a layer has hooks or a forward of its own"
        elif found is not None and self._written.serves(found.looked, layers, places(layers)):
            return [found.factor]
        reason = reason or _refuses(layers)
        if reason:
            self.refused.setdefault(reason, set()).update(layers)
            return None
        found = copies[layers] = _Packed(self._pack(layers, change), self._written.look(layers, places(layers)))
        return [found.factor]

    @staticmethod
    def _pack(layers: tuple[Any, ...], change: LowRankChange | None) -> Factor:
        with torch.no_grad():
            weights = [x.weight if change is None else change.weight_of(x) for x in layers]
            rows = [Rows(*ops.quantize_fp8(weight.detach())) for weight in weights]
            # as bytes: not every device joins numbers of e4m3
            weight = torch.cat([x.values.view(torch.uint8) for x in rows]).view(torch.float8_e4m3fn)
            scale = torch.cat([x.scale for x in rows]).t().contiguous()
            bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
            dtype = layers[0].weight.dtype
            return Factor(weight, scale, bias, dtype)

    def stale(self) -> bool:
        """Whether a weight was written in place since it was converted (fuse_lora does that). Waits for the device."""
        there = [(x.source.view(1), x.scale[0, :1]) for x in self._scales.values() if x.place == x.source.data_ptr()]
        if there and not torch.equal(*(torch.cat(of) for of in zip(*there))):
            return True
        return self._written.found()

    def clear(self) -> None:
        """Free the copies."""
        self._own.clear()
        self._changed.clear()
        self._scales.clear()
        self._written.clear()
        self.refused.clear()


_ACTIVE: ContextVar[tuple[Fp8Linears, bool] | None] = ContextVar("specedit_fp8", default=None)


@contextlib.contextmanager
def active(linears: Fp8Linears | None, every: bool = True) -> Iterator[None]:
    """Within it, in this thread, layers compute in fp8 where `linears` has them; None: as they are.

    every: all of the blocks, and attention; False: those that ask for it themselves (`asked_by`).
    """
    token = _ACTIVE.set(None if linears is None else (linears, every))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def _now() -> tuple[Fp8Linears, bool] | None:
    """What is active, and for which layers. torch.compile cannot trace the question; what is compiled runs without."""
    return None if torch.compiler.is_compiling() else _ACTIVE.get()


def is_active() -> bool:
    """Whether layers compute in fp8 in this thread."""
    return _now() is not None


def active_for() -> str:
    """Which layers do: "all", "those that ask" or "". What was captured for some serves no others."""
    now = _now()
    return "" if now is None else "all" if now[1] else "those that ask"


def attends(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether attention over kept keys and values is in e4m3 too: where its CUDA kernel serves it.

    The Triton kernel is slower than attention in bf16 (bench/log/fp8.md). dtype: of the model; dim: of a head.
    """
    if active_for() != "all" or device.type != "cuda" or dtype != torch.bfloat16 or dim != ATTENTION_DIM:
        return False
    return ops.backend_of("mixed_res_attn_fp8", device)[0] == "cuda"


def reason_against(device: torch.device) -> str:
    """Why nothing can compute in fp8 on a device, or ""."""
    if torch.is_autocast_enabled(device.type):
        return "autocast chooses the dtype of products"
    if device.type == "cpu":
        return ""
    if device.type != "cuda":
        return f"it needs a CUDA device or a CPU, the transformer is on {device}"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if (major, minor) >= (8, 9) else f"it needs compute capability 8.9, {device} has {major}.{minor}"


def serves(*groups: Sequence[torch.nn.Module]) -> bool:
    """Whether all these layers compute in fp8; a group's layers take the same rows in one product."""
    now = _now()
    if now is None:
        return False
    found = [now[0].of(tuple(group), now[1]) for group in groups]  # all are asked, to say of each why it is refused
    return all(x is not None for x in found)


def products(layers: Sequence[Any], x: Tensor | Rows) -> list[Tensor] | None:
    """[layer(x) for layer in layers] of x [..., K], with the active low-rank change; None where they do not compute in
    fp8. Rows are quantised once."""
    now = _now()
    factors = None if now is None else now[0].of(tuple(layers), now[1])
    if factors is None:
        return None
    rows = x if isinstance(x, Rows) else Rows(*ops.quantize_fp8(x))
    lead = rows.values.shape[:-1]
    flat = Rows(rows.values.flatten(0, -2), rows.scale.flatten(0, -2))
    found = [_multiply(*flat, factor).unflatten(0, lead) for factor in factors]
    if len(found) == len(layers):
        return found
    return list(found[0].split([layer.out_features for layer in layers], dim=-1))


def _multiply(values: Tensor, scale: Tensor, factor: Factor) -> Tensor:
    """[M, K] and [M, 1] with a factor: [M, N]."""
    if values.is_cuda:
        return torch._scaled_mm(
            values, factor.weight.t(), scale, factor.scale, bias=factor.bias, out_dtype=factor.dtype,
            use_fast_accum=FAST_ACCUMULATION,
        )  # fmt: skip
    y = (values.float() @ factor.weight.float().t()) * scale * factor.scale
    return (y if factor.bias is None else y + factor.bias.float()).to(factor.dtype)
