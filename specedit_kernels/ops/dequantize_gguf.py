# SPDX-License-Identifier: Apache-2.0
"""``dequantize_gguf``: weights in the blocks of a GGUF file, in the dtype of a product."""

import torch

from .._gguf import BLOCKS
from . import _backends, _checks
from ._library import register

_OP = "dequantize_gguf"


def _check(blocks, kind, dtype):
    """The shape of the result."""
    _checks.check_dtype(_OP, "blocks", blocks, (torch.uint8,))
    if kind not in BLOCKS:
        _checks.value_error(_OP, "kind", f"one of {', '.join(BLOCKS)}", repr(kind))
    values, size = BLOCKS[kind]
    if blocks.dim() == 0 or blocks.shape[-1] % size:
        expected = f"whole blocks of {size} bytes in the last dimension"
        _checks.value_error(_OP, "blocks", expected, _checks.shape_of(blocks))
    if not blocks.is_contiguous():
        _checks.value_error(_OP, "blocks", "a contiguous tensor", f"strides {list(blocks.stride())}")
    if dtype not in _checks.FLOATS:
        _checks.type_error(_OP, "dtype", "bfloat16, float16 or float32", str(dtype).removeprefix("torch."))
    return (*blocks.shape[:-1], blocks.shape[-1] // size * values)


def _implementation(blocks, kind, dtype):
    _check(blocks, kind, dtype)
    return _backends.implementation(_OP, blocks.device)(blocks, kind, dtype)


def _fake(blocks, kind, dtype):
    return blocks.new_empty(_check(blocks, kind, dtype), dtype=dtype)


_op = register("dequantize_gguf(Tensor blocks, str kind, ScalarType dtype) -> Tensor", _implementation, _fake)
_backends.add(_OP, "dequantize_gguf")


def dequantize_gguf(blocks, kind, dtype):
    """The numbers that blocks of a GGUF file hold, in the dtype of a product, at the speed of memory.

    Args:
        blocks: uint8 [..., n * bytes of a block], contiguous: whole blocks, as the file has them.
        kind: the type of the blocks: "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K" or "Q6_K".
        dtype: torch.bfloat16, torch.float16 or torch.float32.

    Returns:
        [..., n * values of a block], contiguous. A block's scales are fp16, and each product and sum with them is
        rounded to fp16, as diffusers has it; the result is then rounded to ``dtype``: the numbers of
        ``dequantize_gguf_tensor(weight).to(dtype)``.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Source: ggml's block formats (ggml-common.h, ggml-quants.c).
    """
    return _op(blocks, kind, dtype)
