# SPDX-License-Identifier: Apache-2.0
"""Linear layers in fp8: e4m3 weights with a scale for each output, activations with a scale for each row; and where
attention is in fp8 too.

`precision="fp8"` makes this hold within a run of a fused forward, for the layers that it asks for (`modulated`,
`linear` and `hidden` in fused.py): those of the blocks. A layer's weight is converted at its first use, and under a
low-rank change the changed weight; the model keeps its own, so that LoRA files, disable_specedit() and runs in the
model's own dtype work as before. On a CPU the same numbers are multiplied in fp32: slow, for tests and for measuring
quality.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import ops
from ._diffusers import foreign_forward, hooked, is_wrapper
from .low_rank import OWN_HOOKS, LowRankChange, active_change

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


@dataclass(frozen=True)
class _Packed:
    """Weights of layers that take the same rows, concatenated. weight: e4m3 [N, K]. scale: fp32 [1, N]. bias: [N]
    or None. places: addresses of the layers' own weights. sample: some of their elements. dtype: of the result."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    places: list[int]
    sample: Tensor
    dtype: torch.dtype


def _parts(layers: Sequence[Any]) -> list[Tensor]:
    return [x.detach() for layer in layers for x in (layer.weight, layer.bias) if x is not None]


def _places(layers: Sequence[Any]) -> list[int]:
    return [x.data_ptr() for layer in layers for x in (layer.weight, layer.bias) if x is not None]


def _sample(layers: Sequence[torch.nn.Module]) -> Tensor:
    """From the middle of each weight and bias: merging an adapter changes all of a weight."""
    flat = [x.flatten() for x in _parts(layers)]
    return torch.cat([x[len(x) // 2 : len(x) // 2 + _SAMPLED] for x in flat])


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


_Copies = dict[tuple[torch.nn.Module, ...], _Packed]


class Fp8Linears:
    """Converted weights of a transformer's layers. refused: {why layers compute as they are: these layers}.

    A low-rank change that is active is within the copies, of which each change has its own, as long as it lives.
    """

    def __init__(self) -> None:
        self._own: _Copies = {}
        self._changed: WeakKeyDictionary[LowRankChange, _Copies] = WeakKeyDictionary()
        self.refused: dict[str, set[torch.nn.Module]] = {}

    def _all(self) -> list[tuple[tuple[torch.nn.Module, ...], _Packed]]:
        return [pair for copies in (self._own, *self._changed.values()) for pair in copies.items()]

    @property
    def bytes(self) -> int:
        """Memory of the copies."""
        copies = (x for _, p in self._all() for x in (p.weight, p.scale, p.bias) if x is not None)
        return sum(x.numel() * x.element_size() for x in copies)

    def of(self, layers: tuple[torch.nn.Module, ...]) -> _Packed | None:
        """The copy of layers that take the same rows, made where there is none; None where one of them is refused."""
        change = active_change()
        copies = self._own if change is None else self._changed.setdefault(change, {})
        found, reason = copies.get(layers), ""
        if any(hooked(vars(layer), OWN_HOOKS) or foreign_forward(layer) for layer in layers):
            reason = "a layer has hooks or a forward of its own"
        elif found is not None and found.places == _places(layers):
            return found
        reason = reason or _refuses(layers)
        if reason:
            self.refused.setdefault(reason, set()).update(layers)
            return None
        found = copies[layers] = self._pack(layers, change)
        return found

    @staticmethod
    def _pack(layers: tuple[Any, ...], change: LowRankChange | None) -> _Packed:
        with torch.no_grad():
            weights = [x.weight if change is None else change.weight_of(x) for x in layers]
            rows = [Rows(*ops.quantize_fp8(weight.detach())) for weight in weights]
            # as bytes: not every device joins numbers of e4m3
            weight = torch.cat([x.values.view(torch.uint8) for x in rows]).view(torch.float8_e4m3fn)
            scale = torch.cat([x.scale for x in rows]).t().contiguous()
            bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
            dtype = layers[0].weight.dtype
            return _Packed(weight, scale, bias, _places(layers), _sample(layers), dtype)

    def stale(self) -> bool:
        """Whether a weight was written in place since it was converted (fuse_lora does that). Waits for the device."""
        there = [(layers, packed) for layers, packed in self._all() if packed.places == _places(layers)]
        if not there:
            return False
        now = torch.cat([_sample(layers) for layers, _ in there])
        return not torch.equal(now, torch.cat([packed.sample for _, packed in there]))

    def clear(self) -> None:
        """Free the copies."""
        self._own.clear()
        self._changed.clear()
        self.refused.clear()


_ACTIVE: ContextVar[Fp8Linears | None] = ContextVar("specedit_fp8", default=None)


@contextlib.contextmanager
def active(linears: Fp8Linears | None) -> Iterator[None]:
    """Within it, in this thread, layers compute in fp8 where `linears` has them; None: as they are."""
    token = _ACTIVE.set(linears)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def _now() -> Fp8Linears | None:
    """What is active. torch.compile cannot trace the question; what is compiled runs without."""
    return None if torch.compiler.is_compiling() else _ACTIVE.get()


def is_active() -> bool:
    """Whether layers compute in fp8 in this thread. What was captured then serves no other calls."""
    return _now() is not None


def attends(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether attention over kept keys and values is in e4m3 too: where its CUDA kernel serves it.

    The Triton kernel is slower than attention in bf16 (bench/log/fp8.md). dtype: of the model; dim: of a head.
    """
    if not is_active() or device.type != "cuda" or dtype != torch.bfloat16 or dim != ATTENTION_DIM:
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
    linears = _now()
    if linears is None:
        return False
    found = [linears.of(tuple(group)) for group in groups]  # all are asked, to say of each why it is refused
    return all(x is not None for x in found)


def product(layers: Sequence[torch.nn.Module], x: Tensor | Rows) -> Tensor | None:
    """The layers' results on x [..., K] side by side, [..., N], with the active low-rank change; None where they do not
    compute in fp8."""
    linears = _now()
    packed = None if linears is None else linears.of(tuple(layers))
    if packed is None:
        return None
    rows = x if isinstance(x, Rows) else Rows(*ops.quantize_fp8(x))
    lead = rows.values.shape[:-1]
    return _multiply(rows.values.flatten(0, -2), rows.scale.flatten(0, -2), packed).unflatten(0, lead)


def _multiply(values: Tensor, scale: Tensor, packed: _Packed) -> Tensor:
    """[M, K] and [M, 1] with packed weights: [M, N]."""
    if values.is_cuda:
        return torch._scaled_mm(
            values, packed.weight.t(), scale, packed.scale, bias=packed.bias, out_dtype=packed.dtype,
            use_fast_accum=FAST_ACCUMULATION,
        )  # fmt: skip
    y = (values.float() @ packed.weight.float().t()) * scale * packed.scale
    return (y if packed.bias is None else y + packed.bias.float()).to(packed.dtype)
