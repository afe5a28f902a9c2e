# SPDX-License-Identifier: Apache-2.0
"""scatter_tokens_: each row read and written once; bound by memory."""

import pytest
import torch

# (tokens, rows written, trailing dimensions): hidden states, and the keys of 24 heads.
SHAPES = ((4096, 922, (3072,)), (8704, 5120, (24, 128)), (4096, 922, (64,)))


@pytest.mark.parametrize("case", SHAPES, ids=lambda c: f"{c[1]} of {c[0]}x{'x'.join(map(str, c[2]))}")
@pytest.mark.parametrize("impl", ("specedit", "index_copy_", "scatter_"))
def test_scatter(timed, case, impl):
    tokens, rows, trailing = case
    src = torch.randn(1, rows, *trailing, device="cuda", dtype=torch.bfloat16)
    dst = torch.zeros(1, tokens, *trailing, device="cuda", dtype=torch.bfloat16)
    index = torch.randperm(tokens, device="cuda")[:rows].sort().values
    narrow = index.int()[None]
    wide = index.view(1, rows, *[1] * len(trailing)).expand(1, rows, *trailing)
    fn = {
        "specedit": lambda: torch.ops.specedit.scatter_tokens_(dst, src, narrow),
        "index_copy_": lambda: dst.index_copy_(1, index, src),
        "scatter_": lambda: dst.scatter_(1, wide, src),
    }[impl]
    fn()
    want = torch.zeros_like(dst)
    want[:, index] = src
    same = torch.equal(dst, want)
    timed(
        fn, op="scatter_tokens_", impl=impl, shape=f"{rows} into {tokens} x {list(trailing)}", dtype=src.dtype,
        moved_bytes=2 * src.numel() * src.element_size() + 4 * rows, error_ok=same,
    )  # fmt: skip
    assert same
