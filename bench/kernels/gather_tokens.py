# SPDX-License-Identifier: Apache-2.0
"""gather_tokens: each row read and written once; bound by memory."""

import pytest
import torch

# (tokens, rows taken, trailing dimensions): hidden states, and the keys of 24 heads.
SHAPES = ((4096, 922, (3072,)), (8704, 5120, (24, 128)), (4096, 922, (64,)))


@pytest.mark.parametrize("case", SHAPES, ids=lambda c: f"{c[1]} of {c[0]}x{'x'.join(map(str, c[2]))}")
@pytest.mark.parametrize("impl", ("specedit", "index_select", "torch.gather"))
def test_gather(timed, case, impl):
    tokens, length, trailing = case
    x = torch.randn(1, tokens, *trailing, device="cuda", dtype=torch.bfloat16)
    index = torch.randperm(tokens, device="cuda")[:length].sort().values
    narrow = index.int()[None]
    wide = index.view(1, length, *[1] * len(trailing)).expand(1, length, *trailing)
    fn = {
        "specedit": lambda: torch.ops.specedit.gather_tokens(x, narrow, length),
        "index_select": lambda: x.index_select(1, index),
        "torch.gather": lambda: x.gather(1, wide),
    }[impl]
    same = torch.equal(fn(), x[:, index])
    timed(
        fn, op="gather_tokens", impl=impl, shape=f"{length} of {tokens} x {list(trailing)}", dtype=x.dtype,
        moved_bytes=2 * length * x[0, 0].numel() * x.element_size() + 4 * length, error_ok=same,
    )  # fmt: skip
    assert same
