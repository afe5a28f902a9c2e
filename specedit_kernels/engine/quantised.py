# SPDX-License-Identifier: Apache-2.0
"""What a linear layer's weight of torchao's holds, for a fused forward that computes with it as it lies.

torchao is not imported, since a model without such weights does not need it. A weight is read where all of it is as
torchao 0.18 has it; of any other the layer is called.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._diffusers import foreign_forward, hooked
from .low_rank import OWN_HOOKS

_VERSION = "0.18."
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
