# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

op = torch.ops.specedit.raise_scales_fp8_
LEAST = torch.finfo(torch.float32).tiny


def scales(batch, heads, kv_heads, device, value=LEAST):
    return [torch.full((batch, 1, n), value, device=device) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 16), (2, 37, 6, 3, 48), (1, 700, 4, 4, 128), (2, 65, 2, 2, 64)], ids=str
)
@pytest.mark.parametrize("weights", ["both", "none", "q"])
def test_against_float64(backend, random, device, shape, dtype, weights):
    batch, rows, heads, kv_heads, dim = shape
    wide = (random(batch, rows + 2, kv_heads * 3, dim, device=device) * 5).to(dtype)
    wide[:, [0, -1]] = 1000.0  # rows of others
    v = wide[:, 1:-1, kv_heads : 2 * kv_heads]
    q_weight, k_weight = (random(dim, device=device).to(dtype) for _ in range(2))
    given = dict(q_weight=q_weight if weights != "none" else None, k_weight=k_weight if weights == "both" else None)
    found = scales(batch, heads, kv_heads, device)
    op(*found, v, **given, headroom=8.0)
    tops = [1.0 if w is None else w.double().abs().max().item() for w in given.values()]
    for scale, top in zip(found, tops):
        torch.testing.assert_close(scale, torch.full_like(scale, top * math.sqrt(dim) / 448), rtol=1e-6, atol=0)
    want = v.double().abs().amax((1, 3))[:, None] * 8 / 448
    torch.testing.assert_close(found[2].double(), want, rtol=1e-6, atol=0)


def test_streams_of_a_sequence_and_scales_that_are_larger(backend, random, device):
    text, image = (random(2, n, 3, 32, device=device) for n in (5, 200))
    norms = [random(32, device=device).abs() for _ in range(2)]
    found = scales(2, 3, 3, device)
    for v, norm in zip((text, image), norms):
        op(*found, v, q_weight=norm, k_weight=norm)
    whole = scales(2, 3, 3, device)
    op(*whole, torch.cat([text, image], 1), q_weight=torch.maximum(*norms), k_weight=torch.maximum(*norms))
    assert all(torch.equal(a, b) for a, b in zip(found, whole))
    larger = scales(2, 3, 3, device, 1e6)
    op(*larger, image)
    assert all((x == 1e6).all() for x in larger)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_passes_on(backend, random, device, value):
    v, weight = random(1, 70, 2, 32, device=device), torch.ones(32, device=device)
    v[0, 66, 1, 3], weight[5] = -value, value
    found = scales(1, 2, 2, device)
    op(*found, v, q_weight=weight)
    assert found[2][0, 0, 0].isfinite() and torch.equal(
        found[2][0, 0, 1].isnan(), torch.tensor(value).isnan().to(device)
    )
    assert not found[2][0, 0, 1].isfinite() and not found[0].isfinite().any() and found[1].isfinite().all()


def test_no_rows(backend, device):
    found = scales(1, 2, 2, device)
    op(*found, torch.ones(1, 0, 2, 32, device=device))
    assert (found[2] == LEAST).all() and (found[0] > LEAST).all()


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(v=torch.ones(3, 2, 16)), ValueError, r"v: expected shape \[B, N, Hk, D\], got \[3, 2, 16\]"),
        (dict(v=torch.ones(1, 3, 2, 16).int()), TypeError, "v: expected dtype"),
        (dict(v_scale=torch.ones(1, 1, 3)), ValueError, r"v_scale: expected shape \[1, 1, 2\], got \[1, 1, 3\]"),
        (dict(q_scale=torch.ones(1, 2, 2)), ValueError, r"q_scale: expected shape \[1, 1, H\]"),
        (dict(k_scale=torch.ones(1, 1, 2).double()), TypeError, "k_scale: expected dtype float32"),
        (dict(q_weight=torch.ones(8)), ValueError, r"q_weight: expected shape \[16\], got \[8\]"),
        (dict(headroom=0.0), ValueError, r"headroom: expected a finite number > 0 \(in fp32\), got 0.0"),
    ],
)
def test_bad_input(change, error, words):
    given = dict(q_scale=torch.ones(1, 1, 4), k_scale=torch.ones(1, 1, 2), v_scale=torch.ones(1, 1, 2),
                 v=torch.ones(1, 3, 2, 16))  # fmt: skip
    with pytest.raises(error, match=words):
        op(**(given | change))
    assert all((x == 1).all() for x in given.values())
