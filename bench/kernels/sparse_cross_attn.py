# SPDX-License-Identifier: Apache-2.0
"""sparse_cross_attn: 4096 image queries, 512 text tokens, 24 heads of 128, against SDPA with the equivalent mask.

Its floor is memory: it writes out and lse whole, and reads the queries of the edit, the mask and the kept tokens.
"""

import pytest
import torch
import torch.nn.functional as F

QUERIES, TEXT, HEADS, DIM, DTYPE = 4096, 512, 24, 128, torch.bfloat16
# (share of the queries in the edit's region, text tokens that it sees, whether the region is a compact block)
CASES = ((0.1, 32, True), (0.1, 32, False), (0.1, 512, True), (0.4, 32, True), (1.0, 512, True))


def _name(case):
    return f"{case[0]:.0%} of {QUERIES} see {case[1]} of {TEXT}" + ("" if case[2] else ", scattered")


def _sdpa(q, k, v, sees):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # A row without a key is NaN: SDPA has no rule for it.
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees[:, None]).transpose(1, 2)


@pytest.mark.parametrize("case", CASES, ids=_name)
@pytest.mark.parametrize("impl", ("specedit", "sdpa + boolean mask"))
def test_sparse_cross_attn(timed, case, impl):
    share, kept, compact = case
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, n, HEADS, DIM, device="cuda", dtype=DTYPE, generator=generator) for n in (QUERIES, TEXT, TEXT)
    )
    side = int(QUERIES**0.5)
    inside = torch.zeros(QUERIES, dtype=torch.bool, device="cuda")
    count = round(share * QUERIES)
    if compact:
        edge = round(count**0.5)
        inside.view(side, side)[:edge, :edge] = True
    else:
        inside[torch.randperm(QUERIES, device="cuda", generator=generator)[:count]] = True
    region = (inside.int() - 1)[None]
    mask = torch.zeros(1, 1, TEXT, dtype=torch.bool, device="cuda")
    mask[..., torch.randperm(TEXT, device="cuda", generator=generator)[:kept]] = True
    sees = inside[None, :, None] & mask
    run = {
        "specedit": lambda: torch.ops.specedit.sparse_cross_attn(q, k, v, region, mask)[0],
        "sdpa + boolean mask": lambda: _sdpa(q, k, v, sees),
    }[impl]
    score = (q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1) * DIM**-0.5).masked_fill(~mask, -torch.inf)
    exact = (score.softmax(-1) @ v.double().transpose(1, 2)).transpose(1, 2)[:, inside]
    plain = (score.to(DTYPE).softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)[:, inside]
    error, budget = (((x.double() - exact).norm() / exact.norm()).item() for x in (run()[:, inside], plain))
    rows = HEADS * DIM * DTYPE.itemsize
    moved = QUERIES * (rows + HEADS * 4 + 4) + int(inside.sum()) * rows + 2 * kept * rows + TEXT
    timed(
        run,
        op="sparse_cross_attn",
        impl=impl,
        shape=_name(case),
        dtype=DTYPE,
        moved_bytes=moved,
        error=error,
        error_ok=error <= budget + torch.finfo(DTYPE).eps / 2,
    )
