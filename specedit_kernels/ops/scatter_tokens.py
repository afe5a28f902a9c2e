# SPDX-License-Identifier: Apache-2.0
"""``scatter_tokens_``: rows written to their places in a token sequence."""

from . import _backends, _checks
from ._library import register

_OP = "scatter_tokens_"


def _check(dst, src, index):
    if dst.dim() < 2:
        _checks.value_error(_OP, "dst", "[B, N, ...]", _checks.shape_of(dst))
    _checks.check_shape(
        _OP, "src", src, (dst.shape[0], None, *dst.shape[2:]), f"[B, M, ...] like dst {_checks.shape_of(dst)}"
    )
    if src.dtype != dst.dtype:
        _checks.type_error(_OP, "src", f"dst's dtype {dst.dtype}", src.dtype)
    _checks.check_device(_OP, "src", src, dst.device)
    if dst.dim() > 2:
        _checks.check_last_contiguous(_OP, "dst", dst)
        _checks.check_last_contiguous(_OP, "src", src)
    _checks.check_dtype(_OP, "index", index, _checks.INT32)
    if index.dim() != 2 or index.shape[0] != dst.shape[0] or index.shape[1] < src.shape[1]:
        _checks.value_error(_OP, "index", f"shape [B={dst.shape[0]}, >= {src.shape[1]}]", _checks.shape_of(index))
    _checks.check_device(_OP, "index", index, dst.device)


def _implementation(dst, src, index):
    _check(dst, src, index)
    index = index[:, : src.shape[1]]
    if dst.device.type == "cpu" or _checks.debugging():
        _checks.check_index_range(_OP, "index", index, dst.shape[1])
    if _checks.debugging():
        _checks.check_no_duplicates(_OP, "index", index)
    _backends.implementation(_OP, dst.device)(dst, src, index)


def _fake(dst, src, index):
    _check(dst, src, index)


_op = register("scatter_tokens_(Tensor(a!) dst, Tensor src, Tensor index) -> ()", _implementation, _fake)
_backends.add(_OP, "scatter_tokens")


def scatter_tokens_(dst, src, index):
    """dst[b, index[b, i]] = src[b, i] in place for i < M; a -1 is skipped; other rows of ``dst`` keep their bits.

    Args:
        dst: [B, N, ...], any dtype.
        src: [B, M, ...], dst's dtype.
        index: int32 [B, >= M], values from -1 to N - 1, no destination twice (SPECEDIT_DEBUG=1 checks both; the
            range is checked on CPU always).

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came; ``dst`` is then untouched.
    """
    _op(dst, src, index)
