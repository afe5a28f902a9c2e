# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

op = torch.ops.specedit.lerp_


def made(random, device, dtype, *shape):
    """a, b as slices of longer tensors."""
    longer = (shape[0], shape[1] + 5, *shape[2:])
    return [(random(*longer, device=device) * size).to(dtype)[:, : shape[1]] for size in (1.0, 30.0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 37, 3, 16), (1, 300, 2, 128), (3, 5, 7)], ids=str)
def test_against_float64(backend, poison, random, device, shape, weight, dtype):
    a, b = made(random, device, dtype, *shape)
    out = torch.full((shape[0], shape[1] + 9, *shape[2:]), float("nan"), dtype=dtype, device=device)
    op(out[:, 4 : 4 + shape[1]], a, b, torch.tensor(weight, device=device))
    found, w = out[:, 4 : 4 + shape[1]], torch.tensor(weight).double().item()
    want = a.double() + w * (b.double() - a.double())
    # Triton's interpreter cuts bf16 off instead of rounding: a whole step
    half = torch.finfo(dtype).eps / (1 if backend == "triton" and torch.device(device).type == "cpu" else 2)
    bound = half * want.abs() + 2.0**-22 * (a.double().abs() + b.double().abs()) + 2.0**-25
    assert ((found.double() - want).abs() <= bound).all()
    assert out[:, :4].isnan().all() and out[:, 4 + shape[1] :].isnan().all()
    if weight in (0.0, 1.0):
        assert torch.equal(found, a if weight == 0.0 else b)


def test_slices_of_heads(backend, random, device):
    a, b = (random(2, 9, 6, 20, device=device)[:, 1:8, ::2, 3:19] for _ in range(2))
    whole = torch.full((2, 7, 5, 19), 7.0, device=device)
    op(whole[:, :, 1:4, 2:18], a, b, torch.tensor(0.75, device=device))
    assert torch.allclose(whole[:, :, 1:4, 2:18], torch.lerp(a, b, 0.75))
    assert (whole[:, :, [0, 4]] == 7).all() and (whole[..., [0, 1, 18]] == 7).all()


@pytest.mark.parametrize("which", [0, 1])
def test_in_place(backend, random, device, which):
    ends = made(random, device, torch.bfloat16, 2, 33, 4, 16)
    weight, want = torch.tensor(0.25, device=device), torch.empty_like(ends[0])
    op(want, *ends, weight)
    op(ends[which], *ends, weight)
    assert torch.equal(ends[which], want)


def test_nan_stays_in_its_place(backend, random, device):
    """What a buffer has beyond a sequence's rows."""
    a, b = made(random, device, torch.bfloat16, 1, 9, 2, 16)
    b[:, 7:] = float("nan")
    out = torch.zeros_like(a)
    op(out, a, b, torch.tensor(0.5, device=device))
    assert out[:, :7].isfinite().all() and out[:, 7:].isnan().all()


def test_no_rows(backend, device):
    x = torch.ones(2, 0, 3, device=device)
    op(x, x.clone(), x.clone(), torch.tensor(0.5, device=device))


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(out=torch.ones(3, 2)), ValueError, r"out: expected \[B, N, C\] or \[B, N, H, D\], got \[3, 2\]"),
        (dict(out=torch.ones(1, 3, 16, dtype=torch.int32)), TypeError, "out: expected dtype"),
        (dict(a=torch.ones(1, 3, 16).half()), TypeError, "a: expected out's dtype torch.float32"),
        (dict(b=torch.ones(1, 4, 16)), ValueError, r"b: expected shape \[1, 3, 16\]"),
        (dict(a=torch.ones(1, 3, 32)[..., ::2]), ValueError, "a: expected a contiguous last dimension"),
        (dict(weight=torch.ones(1)), ValueError, "weight: expected shape"),
        (dict(weight=torch.ones((), dtype=torch.float64)), TypeError, "weight: expected dtype float32"),
    ],
)
def test_bad_input(change, error, words):
    x = torch.ones(1, 3, 16)
    given = dict(out=x.clone(), a=x, b=x, weight=torch.ones(()))
    with pytest.raises(error, match=words):
        op(**(given | change))
    assert torch.equal(given["out"], x)
