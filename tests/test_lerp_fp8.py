# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from specedit_kernels._panels import in_panels, panels_of

op = torch.ops.specedit.lerp_fp8_
E4M3 = torch.float8_e4m3fn


def made(random, device, batch, rows, heads, dim, panels=False):
    """out, out_scale, a, a_scale, b, b_scale, as slices of longer ones."""
    found = []
    for size in (1.0, 30.0, 3.0):
        x = (random(batch, rows + 16, heads, dim, device=device) * size * 10).clamp(-448, 448).to(E4M3)
        x = in_panels(x)[:, : panels_of(rows)] if panels else x[:, :rows]
        found += [x, random(batch, 1, heads, device=device).abs() + 0.01]
    return found


@pytest.mark.parametrize("panels", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 37, 3, 16), (1, 300, 2, 128), (2, 5, 2, 48)], ids=str)
def test_against_float64(backend, poison, random, device, shape, weight, panels):
    out, out_scale, a, a_scale, b, b_scale = made(random, device, *shape, panels)
    whole = out._base if out._base is not None else out
    op(out, out_scale, a, a_scale, b, b_scale, torch.tensor(weight, device=device))
    assert torch.equal(out_scale, torch.maximum(a_scale, b_scale))
    w = float(torch.tensor(weight))
    scales = [s.double().reshape(*s.shape, *[1] * (out.dim() - 3)) for s in (a_scale, b_scale, out_scale)]
    want = ((1 - w) * a.double() * scales[0] + w * b.double() * scales[1]) / scales[2]
    assert ((out.double() - want).abs() <= 1.001 * (want.abs() / 17).clamp_min(2.0**-10) + 1e-4).all()
    if weight in (0.0, 1.0):
        chosen, scale = (a, a_scale) if weight == 0.0 else (b, b_scale)
        same = (scale == out_scale)[:, 0]
        pairs = [x.view(torch.uint8).movedim(2, 1)[same] for x in (out, chosen)]
        assert torch.equal(pairs[0] & 0x7F, pairs[1] & 0x7F)
    assert whole.float().isfinite().all()


def test_rows_beyond_stay(backend, random, device):
    _, out_scale, a, a_scale, b, b_scale = made(random, device, 2, 37, 3, 16)
    longer = torch.full((2, 50, 3, 16), 7, dtype=torch.uint8, device=device).view(E4M3)
    op(longer[:, :37], out_scale, a, a_scale, b, b_scale, torch.tensor(0.5, device=device))
    assert (longer.view(torch.uint8)[:, 37:] == 7).all()


def test_nan_in_a_panel_stays_where_it_is(backend, random, device):
    """What a panel has beyond the last key."""
    args = made(random, device, 2, 37, 3, 16, panels=True)
    for x in args[2:5:2]:
        x.view(torch.uint8)[..., 37:] = 0x7F
    op(*args, torch.tensor(0.5, device=device))
    assert args[0][..., :37].float().isfinite().all()


def test_no_rows(backend, random, device):
    args = made(random, device, 1, 0, 2, 16)
    op(*args, torch.tensor(0.5, device=device))


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(a=torch.ones(1, 3, 2, 16)), TypeError, "a: expected dtype float8_e4m3fn, got float32"),
        (dict(b=torch.ones(1, 4, 2, 16).to(E4M3)), ValueError, r"b: expected shape \[1, 3, 2, 16\]"),
        (dict(out=torch.ones(3, 2, 16).to(E4M3)), ValueError, r"out: expected \[B, S, H, D\], or panels"),
        (dict(a=torch.ones(1, 3, 2, 32).to(E4M3)[..., ::2]), ValueError, "a: expected each head's part contiguous"),
        (dict(b_scale=torch.ones(1, 3, 2)), ValueError, r"b_scale: expected shape \[1, 1, 2\], one a head"),
        (dict(weight=torch.ones(1)), ValueError, "weight: expected shape"),
        (dict(weight=torch.ones((), dtype=torch.float64)), TypeError, "weight: expected dtype float32"),
    ],
)
def test_bad_input(change, error, words):
    x, scale = torch.ones(1, 3, 2, 16).to(E4M3), torch.ones(1, 1, 2)
    given = dict(out=x.clone(), out_scale=scale.clone(), a=x, a_scale=scale, b=x, b_scale=scale, weight=torch.ones(()))
    with pytest.raises(error, match=words):
        op(**(given | change))
