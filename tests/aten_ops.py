# SPDX-License-Identifier: Apache-2.0
"""csrc/aten's ops against the reference, in a process of its own: `python tests/aten_ops.py libspecedit_ops.so`.

Loaded before the package, the library defines the ops and serves them; the package then takes its schemas for equal, or
refuses to be imported.
"""

import itertools
import sys

import torch

torch.ops.load_library(sys.argv[1])

from specedit_kernels import ops
from specedit_kernels.reference.mixed_res_attn import mixed_res_attn
from specedit_kernels.reference.qk_norm_rope_scatter import qk_norm_rope_scatter_

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def index(low, high, batch, slots):
    return torch.stack([torch.randperm(high - low)[:slots] + low for _ in range(batch)]).int()


def same(found, expected, dtype):
    for a, b in zip(found, expected):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[dtype], equal_nan=True)


def attention():
    choices = list(itertools.product(TOLERANCE, (2, 1), (False, True), (False, True), (False, True), (5, 0)))
    for dtype, kv_heads, biased, indexed, limited, keys in choices:
        q = torch.randn(2, 6, 32, 2).transpose(2, 3).contiguous().to(dtype)  # [B, S, H, D]
        k, v = torch.randn(2, 2, keys, kv_heads, 32).to(dtype)
        bias = torch.randn(2, keys) if biased else None
        if biased and keys:
            bias[0, 1] = -torch.inf
            bias[1] = -torch.inf  # no key is left
        q_index, kv_index = (index(-1, 6, 2, 4), index(-1, keys, 2, keys)) if indexed else (None, None)
        q_lens, kv_lens = (torch.tensor(x, dtype=torch.int32) for x in ([3, 9], [2, 0])) if limited else (None, None)
        if limited and not indexed and keys:
            k[1], v[1] = torch.nan, torch.nan  # empty slots
        options = dict(key_bias=bias, q_index=q_index, kv_index=kv_index, q_lens=q_lens, kv_lens=kv_lens)
        found = torch.ops.specedit.mixed_res_attn(q, k, v, **options)
        same(found, mixed_res_attn(q, k, v, *options.values(), None, None, None, None, 32**-0.5), dtype)
    return len(choices)


def rotation():
    choices = list(itertools.product(TOLERANCE, (None, 1, 2), (False, True), (1, 2)))
    for dtype, sets, indexed, tables in choices:
        projected = torch.randn(2, 5, 4 + 2 * 2, 16).to(dtype)
        q, k, v = projected.split((4, 2, 2), dim=2)  # views of one projection
        cos, sin = torch.randn(2, tables, 5, 8)
        shape = (16,) if sets == 1 else (2, 16)
        weights = (None, None) if sets is None else (torch.randn(shape).to(dtype), torch.randn(16))
        split = 2 if sets == 2 else None
        at = (index(-1, 7, 2, 5), index(-1, 7, 2, 6)) if indexed else (None, None)
        pair = [[torch.full((2, 7, heads, 16), 3.0, dtype=dtype) for heads in (4, 2, 2)] for _ in range(2)]
        torch.ops.specedit.qk_norm_rope_scatter_(
            *pair[0], q, k, v, cos, sin, q_weight=weights[0], k_weight=weights[1], split=split, q_out_index=at[0],
            kv_out_index=at[1], eps=1e-5,
        )  # fmt: skip
        qk_norm_rope_scatter_(*pair[1], q, k, v, cos, sin, *weights, split or 0, *at, 1e-5)
        same(*pair, dtype)
        assert torch.equal(*(parts[2] for parts in pair))  # v's bits, and rows that no index names
    return len(choices)


def errors():
    q = torch.randn(1, 4, 2, 32)
    attend = torch.ops.specedit.mixed_res_attn
    for error, text, call in (
        (ValueError, "cu_seqlens_q: expected None", lambda: attend(q, q, q, max_seqlen_q=4)),
        (TypeError, "k: expected q's dtype", lambda: attend(q, q.half(), q)),
        (ValueError, "v: expected shape", lambda: attend(q, q, q[:, :3])),
        (ValueError, "q_index: expected values from -1 to 3, got 4 to 4",
         lambda: attend(q, q, q, q_index=torch.full((1, 2), 4, dtype=torch.int32))),
        (TypeError, "key_bias: expected fp32", lambda: attend(q, q, q, key_bias=q[:, :, 0, 0].half())),
        (ValueError, "split: expected", lambda: torch.ops.specedit.qk_norm_rope_scatter_(
            q, q, q, q, q, q, q[:, :, 0, :16], q[:, :, 0, :16], split=1)),
    ):  # fmt: skip
        try:
            call()
        except error as found:
            assert text in str(found), found
        else:
            raise AssertionError(f"expected {error.__name__}: {text}")


if __name__ == "__main__":
    torch.manual_seed(0)
    served = torch._C._dispatch_dump("specedit::mixed_res_attn")
    assert "ops.cpp" in served, served  # not the package's
    assert ops.NAMESPACE == "specedit"
    print(f"attention {attention()}, rotation {rotation()} cases")
    errors()
