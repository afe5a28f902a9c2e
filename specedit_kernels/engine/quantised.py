# SPDX-License-Identifier: Apache-2.0
"""What a linear layer's weight of a library holds, for a fused forward that computes with it as it lies.

No library is imported, since a model without such weights does not need it. A weight is read where all of it, and of
its layer, is as the library's known versions have it: torchao 0.18, optimum-quanto 0.2.7, the GGUF layers of diffusers
0.41 and 0.42. Of any other the layer is called. A weight that is made anew has the bits that the library's own call
multiplies with, but of torchao's int8, where that call scales the product.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .._gguf import BLOCKS
from ._diffusers import foreign_forward, hooked
from .low_rank import OWN_HOOKS

_VERSION = "0.18."
_QUANTO, _QUANTO_VERSION = "optimum.quanto", "0.2.7"
_GGUF, _GGUF_VERSIONS = "diffusers.quantizers.gguf.utils", ("0.41.", "0.42.")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_GRANULARITIES = (("PerRow", -1), ("PerTensor", -1))
_KEPT = {"Int8Tensor": (torch.int8,), "Float8Tensor": (torch.float8_e4m3fn, torch.float8_e5m2)}


class Quantised(NamedTuple):
    """data: int8, e4m3 or e5m2 [N, K]. scale: fp32 [N, 1], or [1, 1]. dynamic: a call quantises its activations too."""

    data: Tensor
    scale: Tensor
    dynamic: bool


@functools.cache
def _kind(cls: type) -> str:
    """The name of a class of torchao's that is known here, or ""."""
    known = cls.__module__ == "torchao.quantization" and cls.__name__ in _KEPT
    version = str(getattr(sys.modules.get("torchao"), "__version__", ""))
    return cls.__name__ if known and version.startswith(_VERSION) else ""


def quantised(layer: Any) -> Quantised | None:
    """The weight of a layer whose call is a product with it and no more, and which is known here; None of others.

    int8: with weights alone. e4m3: with weights alone, or with activations by row or tensor (`dynamic`).
    """
    if type(layer) is not torch.nn.Linear:
        return None
    weight: Any = layer.weight
    cls: Any = type(weight)
    kind = _kind(cls)
    if not kind or hooked(vars(layer), OWN_HOOKS) or foreign_forward(layer):
        return None
    data, scale = weight.qdata, weight.scale
    if any(type(x) is not Tensor or not x.is_contiguous() for x in (data, scale)):
        return None
    if data.dtype not in _KEPT[kind] or data.dim() != 2 or data.shape != weight.shape or scale.dtype != torch.float32:
        return None
    # one scale for each row or for all; blocks in a row have more
    by_row = scale.shape == (len(data), 1) and tuple(weight.block_size) == (1, data.shape[1])
    if not by_row and not (scale.shape == (1, 1) and tuple(weight.block_size) == tuple(data.shape)):
        return None
    asked = weight.act_quant_kwargs
    if kind == "Int8Tensor":
        # a zero point is there for each scale, 0 as the quantisation is symmetric; its own product does not read it
        held = (asked, weight.act_pre_scale, weight.act_quant_scale, weight.act_quant_zero_point)
        return Quantised(data, scale, False) if all(x is None for x in held) else None
    if asked is None:
        return Quantised(data, scale, False)
    product = weight.mm_config
    plain = (
        data.dtype == asked.float8_dtype == torch.float8_e4m3fn
        and type(asked).__name__ == "QuantizeTensorToFloat8Kwargs"
        and (type(asked.granularity).__name__, getattr(asked.granularity, "dim", -1)) in _GRANULARITIES
        and asked.hp_value_lb is None
        and asked.hp_value_ub is None
        # the sum as `fp8.FAST_ACCUMULATION` has it
        and (product.emulate, product.use_fast_accum) == (False, True)
    )
    return Quantised(data, scale, True) if plain else None


class Made(NamedTuple):
    """A weight that is not kept in the dtype of its products. make: gives it, [N, K] of `dtype`, at each call."""

    dtype: torch.dtype
    make: Callable[[], Tensor]


def made(layer: Any) -> Made | None:
    """The weight of a layer whose call is to make it and then one product, and which is known here; None of others."""
    if type(layer) is torch.nn.Linear:
        found = quantised(layer)
        if found is None or found.dynamic:
            return None
        dtype = layer.weight.dtype
        weight: Made | None = Made(dtype, functools.partial(ops.dequantize, found.data, dtype, scale=found.scale))
    else:
        read = _READ.get((type(layer).__module__, type(layer).__name__))
        if read is None or hooked(vars(layer), OWN_HOOKS) or foreign_forward(layer):
            return None
        weight = read(layer)
    bias = layer.bias
    if weight is None or weight.dtype not in _FLOATS:
        return None
    # the sum is in the product's dtype
    own = bias is None or (type(bias) in (torch.nn.Parameter, Tensor) and bias.dtype == weight.dtype)
    return weight if own else None


def _has_class(x: Any, module: str, name: str) -> bool:
    return type(x).__module__ == module and type(x).__name__ == name


def _of_quanto(layer: Any) -> Made | None:
    """int8 and fp8 weights by row, activations as they are."""
    weight: Any = layer.weight
    if getattr(sys.modules.get(_QUANTO), "__version__", "") != _QUANTO_VERSION:
        return None
    if not _has_class(weight, f"{_QUANTO}.tensor.weights.qbytes", "WeightQBytesTensor"):
        return None
    data, scale = weight._data, weight._scale
    if any(type(x) is not Tensor or not x.is_contiguous() for x in (data, scale)):
        return None
    if layer.activation_qtype is not None or weight.activation_qtype is not None or weight.axis != 0:
        return None
    if data.dtype not in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2) or data.dim() != 2:
        return None
    if data.shape != weight.shape or scale.shape != (len(data), 1):
        return None
    if torch.is_grad_enabled() and (weight.requires_grad or scale.requires_grad):
        return None  # its own call has their gradients
    return Made(scale.dtype, functools.partial(ops.dequantize, data, scale.dtype, scale=scale))


def _of_gguf(layer: Any) -> Made | None:
    """Blocks of the types that `ops.dequantize_gguf` has, and bf16."""
    weight: Any = layer.weight
    if not str(getattr(sys.modules.get("diffusers"), "__version__", "")).startswith(_GGUF_VERSIONS):
        return None
    # with kernels of its own (DIFFUSERS_GGUF_CUDA_KERNELS) numbers are rounded otherwise
    if sys.modules[_GGUF].ops is not None or not _has_class(weight, _GGUF, "GGUFParameter"):
        return None
    kind, blocks, dtype = getattr(weight.quant_type, "name", ""), weight.as_tensor(), layer.compute_dtype
    values, size = (1, 2) if kind == "BF16" else BLOCKS.get(kind, (0, 0))
    if not values or blocks.dtype != torch.uint8 or not blocks.is_contiguous():
        return None
    if blocks.dim() != 2 or blocks.shape[1] % size or blocks.storage_offset() % 2:
        return None
    if (blocks.shape[0], blocks.shape[1] // size * values) != (layer.out_features, layer.in_features):
        return None
    if kind == "BF16":
        return Made(dtype, lambda: blocks.view(torch.bfloat16).to(dtype))
    return Made(dtype, functools.partial(ops.dequantize_gguf, blocks, kind, dtype))


# By the module and the name of a layer's class.
_READ: dict[tuple[str, str], Callable[[Any], Made | None]] = {
    (f"{_QUANTO}.nn.qlinear", "QLinear"): _of_quanto,
    (_GGUF, "GGUFLinear"): _of_gguf,
}
