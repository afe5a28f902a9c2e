# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from budget import assert_within_budget

from specedit_kernels.reference.merge_attn import merge_attn as reference

INF = float("inf")


def eager(out_a, lse_a, out_b, lse_b):
    """The weighted mean with weights at the outputs' dtype."""
    lse = torch.logaddexp(lse_a, lse_b)
    a, b = ((x - lse).exp().nan_to_num(0).transpose(-1, -2).unsqueeze(-1).to(out_a.dtype) for x in (lse_a, lse_b))
    return a * out_a + b * out_b, lse


def check(out_a, lse_a, out_b, lse_b):
    out, lse = torch.ops.specedit.merge_attn(out_a, lse_a, out_b, lse_b)
    assert out.is_contiguous() and lse.is_contiguous()
    want_out, want_lse = reference(out_a.double(), lse_a.double(), out_b.double(), lse_b.double())
    eager_out, eager_lse = eager(out_a, lse_a, out_b, lse_b)
    assert_within_budget(out, want_out, eager_out, "out")
    assert_within_budget(lse, want_lse, eager_lse, "lse")
    return out, lse


def halves(random, device, *batch, rows, heads=3, dim=64, dtype=torch.float32):
    for _ in range(2):
        yield random(*batch, rows, heads, dim, dtype=dtype, device=device)
        yield random(*batch, heads, rows, device=device) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 99, 127, 397])
def test_odd_lengths(backend, poison, random, device, rows, dtype):
    check(*halves(random, device, 2, rows=rows, dtype=dtype))


@pytest.mark.parametrize("dim", [16, 48, 96, 128, 256])
def test_head_dimensions(backend, poison, random, device, dim):
    check(*halves(random, device, 1, rows=20, dim=dim))


def test_packed(backend, poison, random, device):
    check(*halves(random, device, rows=77))


def test_strides(backend, poison, random, device):
    out_a, lse_a, out_b, lse_b = halves(random, device, 2, rows=40)
    check(
        out_a.transpose(1, 2).contiguous().transpose(1, 2),
        lse_a.transpose(1, 2).contiguous().transpose(1, 2),
        out_b,
        lse_b,
    )
    check(out_a[:, ::2], lse_a[:, :, ::2], out_b[:, 1::2], lse_b[:, :, 1::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_half_without_keys_changes_nothing(backend, poison, random, device, dtype):
    out_a, lse_a, out_b, lse_b = halves(random, device, 1, rows=12, dtype=dtype)
    lse_a[:, :, :4] = -INF
    lse_b[:, :, 2:6] = -INF
    out_a[:, :4] = float("nan")  # what a half without keys holds is not read
    out, lse = torch.ops.specedit.merge_attn(out_a, lse_a, out_b, lse_b)
    assert torch.equal(out[:, :2], out_b[:, :2]) and torch.equal(lse[:, :, :2], lse_b[:, :, :2])
    assert torch.equal(out[:, 4:6], out_a[:, 4:6]) and torch.equal(lse[:, :, 4:6], lse_a[:, :, 4:6])
    assert not out[:, 2:4].any() and (lse[:, :, 2:4] == -INF).all()
    assert not out.isnan().any() and not lse.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_in_nan_out(backend, poison, random, device, dtype):
    out_a, lse_a, out_b, lse_b = halves(random, device, 1, rows=12, dtype=dtype)
    lse_a[:, :, 0], lse_b[:, :, 1] = float("nan"), float("nan")
    lse_a[:, :, 2], lse_b[:, :, 2] = float("nan"), -INF
    lse_a[:, :, 3], lse_b[:, :, 3] = -INF, float("nan")
    out_a[:, 4], lse_a[:, :, 4] = float("nan"), -1e4  # far below the other half, but there
    out, lse = torch.ops.specedit.merge_attn(out_a, lse_a, out_b, lse_b)
    assert out[:, :5].isnan().all() and lse[:, :, :4].isnan().all()
    assert out[:, 5:].isfinite().all() and lse[:, :, 4:].isfinite().all()


@pytest.mark.parametrize("far", [-1e9, -3e38, 3e38], ids=str)
def test_far_halves(backend, poison, random, device, far):
    """Beside such a number fp32 holds no more: the halves weigh the same, or one alone."""
    out_a, lse_a, out_b, lse_b = halves(random, device, 1, rows=12)
    lse_a[:], lse_b[:] = far, far
    lse_b[:, :, 6:] = 0
    out, lse = torch.ops.specedit.merge_attn(out_a, lse_a, out_b, lse_b)
    torch.testing.assert_close(out[:, :6], (out_a + out_b)[:, :6] / 2)
    assert torch.equal(out[:, 6:], (out_a if far > 0 else out_b)[:, 6:])
    torch.testing.assert_close(lse, torch.maximum(lse_a, lse_b), rtol=1e-6, atol=1)


@pytest.mark.slow
def test_split_is_whole(backend, random, device):
    """Attention over two halves of the keys, merged, is attention over all of them."""
    q, k, v = (random(2, n, 3, 64, device=device) for n in (33, 90, 90))
    bias = random(2, 90, device=device)
    attend = torch.ops.specedit.mixed_res_attn
    a = attend(q, k[:, :31], v[:, :31], key_bias=bias[:, :31])
    b = attend(q, k[:, 31:], v[:, 31:], key_bias=bias[:, 31:])
    whole = attend(q, k, v, key_bias=bias)
    for x, y in zip(torch.ops.specedit.merge_attn(*a, *b), whole):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_far_apart(backend, poison, random, device):
    out_a, lse_a, out_b, lse_b = halves(random, device, 1, rows=9)
    check(out_a, lse_a + 1e4, out_b, lse_b - 1e4)


def test_empty(backend, device):
    out, lse = torch.empty(2, 0, 3, 64, device=device), torch.empty(2, 3, 0, device=device)
    merged = torch.ops.specedit.merge_attn(out, lse, out, lse)
    assert merged[0].shape == out.shape and merged[1].shape == lse.shape


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(out_b=torch.zeros(1, 4, 3, 32)), ValueError, "out_b: expected out_a's shape"),
        (dict(lse_b=torch.zeros(1, 4, 3)), ValueError, r"lse_b: expected shape \[1, 3, 4\] \(heads before rows\)"),
        (dict(lse_a=torch.zeros(1, 3, 4).half()), TypeError, "lse_a: expected dtype float32"),
        (dict(out_a=torch.zeros(4, 3)), ValueError, r"out_a: expected \[B, Nq, H, D\] or \[Tq, H, D\]"),
    ],
)
def test_bad_input(change, error, words):
    call = (
        dict(
            out_a=torch.zeros(1, 4, 3, 64),
            lse_a=torch.zeros(1, 3, 4),
            out_b=torch.zeros(1, 4, 3, 64),
            lse_b=torch.zeros(1, 3, 4),
        )
        | change
    )
    with pytest.raises(error, match=words):
        torch.ops.specedit.merge_attn(*call.values())
