# SPDX-License-Identifier: Apache-2.0
"""Held against float64 on the e4m3 numbers themselves, so that what is left is the error of the op alone.

Budget of a value of out, where w are the softmax weights: each is rounded to e4m3, by at most 2^-4 of itself, or where
it is under 2^-14 of the largest by 2^-18 of that (and as much of the largest scale of v); the result is rounded to
bf16. The roundings of many keys are independent, so that the error of all of out is far smaller: 4 % of its norm for
random v.
"""

import math

import pytest
import torch

from specedit_kernels._panels import PANEL, in_panels
from specedit_kernels.reference.mixed_res_attn import mixed_res_attn as exact_attention
from specedit_kernels.reference.mixed_res_attn_fp8 import dequantised
from specedit_kernels.reference.quantize_fp8 import quantize_fp8

op = torch.ops.specedit.mixed_res_attn_fp8
INF = float("inf")


def quantised(x, by_row=True):
    """e4m3 and scale [B, S, H], or [B, 1, H] where not by_row."""
    if by_row:
        values, scale = quantize_fp8(x, None, None, None, None, False, 0.0)
        return values, scale.squeeze(-1)
    scale = (x.float().abs().amax((1, 3)) / 448).clamp_min(2.0**-126)[:, None]
    return (x / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def factors(random, device, batch, queries, keys, heads, dim, kv_heads=None, q_rows=True, k_rows=True, v_rows=True):
    """q, k, v and their scales; rows of very different sizes."""
    made = []
    of_keys = (keys, kv_heads or heads)
    for n, h, by_row in ((queries, heads, q_rows), (*of_keys, k_rows), (*of_keys, v_rows)):
        x = random(batch, n, h, dim)
        x = x * torch.exp(0.5 * random(batch, n, h, 1)) if len(made) != 1 else x
        made.append([y.to(device) for y in quantised(x, by_row)])
    return (*(x for x, _ in made), *(scale for _, scale in made))


def check(q, k, v, q_scale, k_scale, v_scale, rms=0.04, **options):
    out, lse = op(q, k, v, q_scale, k_scale, v_scale, **options)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert out.is_contiguous() and lse.is_contiguous()
    names = ("key_bias", "q_index", "kv_index", "q_lens", "kv_lens")
    given = [options.get(name) for name in names]
    if given[0] is not None:
        given[0] = given[0].double()
    scale = options.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    doubles = tuple(dequantised(q, k, v, q_scale, k_scale, v_scale, torch.float64))

    def exactly(v):
        return exact_attention(*doubles[:2], v, *given, None, None, None, None, scale)

    want, want_lse = exactly(doubles[2])
    # |v| of rows that hold no number must not count
    magnitude = exactly(doubles[2].abs())[0]
    valid = k.float().isfinite().all(-1) & doubles[2].isfinite().all(-1)
    largest_v = 448 * torch.where(v_scale.isfinite(), v_scale, 0).amax()
    keys = k.shape[1] if given[2] is None else given[2].shape[1]
    size = torch.where(valid, doubles[0].nan_to_num().norm(dim=-1).amax() * doubles[1].nan_to_num().norm(dim=-1), 0)
    farthest = (size.max() * abs(scale)).item() if size.numel() else 0.0
    assert torch.equal(lse.isinf(), want_lse.isinf()) and not lse.isnan().any()
    # sm_90 adds e4m3 products up with some 14 bits
    tolerance = 1e-5 + (2.0**-11 if q.is_cuda else 1e-6) * farthest
    finite = want_lse.isfinite()
    assert ((lse.double() - want_lse)[finite].abs() <= tolerance + 1e-6 * want_lse[finite].abs()).all()
    error = (out.double() - want).abs()
    allowed = magnitude / 16 + keys * 2.0**-18 * largest_v + want.abs() / 256 + 1e-30
    assert not error.isnan().any() and (error <= allowed * (1 + tolerance)).all(), (error / allowed).max()
    assert error.norm() <= rms * want.norm() + 1e-30, (error.norm() / want.norm()).item()
    return out, lse


@pytest.fixture
def dim(backend):
    """A head dimension that the backend serves."""
    return 128 if backend == "cuda" else 64


def multiplicities(batch, keys, device):
    bias = torch.zeros(batch, keys)
    bias[:, keys // 2 :] = math.log(4)
    return bias.to(device)


@pytest.mark.slow
@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 397), (7, 7), (99, 127), (127, 99), (397, 1), (130, 200)])
def test_odd_lengths(backend, dim, poison, random, device, queries, keys):
    call = factors(random, device, 1, queries, keys, 2, dim)
    check(*call, key_bias=multiplicities(1, keys, device))
    check(*call)


@pytest.mark.parametrize("dim", [16, 48, 64, 96, 128, 256])
def test_head_dimensions(backend, poison, random, device, dim):
    if backend == "cuda" and dim != 128:
        pytest.skip("the kernel takes 128 alone")
    check(*factors(random, device, 1, 70, 90, 2, dim), key_bias=multiplicities(1, 90, device))


@pytest.mark.slow
@pytest.mark.parametrize("q_rows", [False, True])
@pytest.mark.parametrize("k_rows", [False, True])
@pytest.mark.parametrize("v_rows", [False, True])
def test_scales_by_row_and_by_head(backend, dim, poison, random, integers, device, q_rows, k_rows, v_rows):
    call = factors(random, device, 2, 40, 150, 2, dim, 1, q_rows, k_rows, v_rows)
    bias = random(2, 150).to(device)
    check(*call, key_bias=bias)
    check(*call)
    check(*call, key_bias=bias, kv_index=integers(-1, 150, (2, 77), device), q_index=integers(-1, 40, (2, 33), device))


def test_arbitrary_bias(backend, dim, poison, random, device):
    call = factors(random, device, 2, 40, 150, 2, dim)
    bias = random(2, 150).to(device) * 5
    bias[:, ::7] = -INF
    check(*call, key_bias=bias)
    check(*call, key_bias=bias + 1000)
    check(*call, key_bias=torch.full_like(bias, -INF))


def test_a_coarse_key_weighs_as_its_fine_ones(backend, dim, random, device):
    q, k, v, q_scale, k_scale, v_scale = factors(random, device, 1, 25, 12, 2, dim)
    repeated = [torch.cat([x[:, :6], x[:, 6:].repeat_interleave(4, 1)], 1) for x in
                (k.view(torch.uint8), v.view(torch.uint8), k_scale, v_scale)]  # fmt: skip
    kr, vr = (x.view(torch.float8_e4m3fn) for x in repeated[:2])
    fine, fine_lse = op(q, kr, vr, q_scale, *repeated[2:])
    mixed, mixed_lse = op(q, k, v, q_scale, k_scale, v_scale, key_bias=multiplicities(1, 12, device))
    # weights are rounded to e4m3, those of a coarse key after the sum of four
    assert (mixed - fine).float().norm() < 0.04 * fine.float().norm()
    torch.testing.assert_close(mixed_lse, fine_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("q_lens, kv_lens", [([40, 7], [1, 90]), ([0, 40], [90, 0]), ([99, 1], [64, 999])], ids=str)
def test_device_side_lengths(backend, dim, poison, random, integers, device, q_lens, kv_lens):
    call = factors(random, device, 2, 40, 90, 2, dim)
    bias = random(2, 90).to(device)
    q_lens, kv_lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in (q_lens, kv_lens))
    check(*call, key_bias=bias, q_lens=q_lens, kv_lens=kv_lens)
    check(*call, q_lens=q_lens)
    check(*call, kv_lens=kv_lens, kv_index=integers(-1, 90, (2, 70), device))


def test_empty_slots_read_nothing(backend, dim, poison, random, device):
    """Rows that no slot names may hold NaN, and so may their scales."""
    q, k, v, q_scale, k_scale, v_scale = factors(random, device, 1, 40, 70, 2, dim)
    for x, first in ((q, 30), (k, 50), (v, 50)):
        x.view(torch.uint8)[:, first:] = 0x7F
    for x, first in ((q_scale, 30), (k_scale, 50), (v_scale, 50)):
        x[:, first:] = float("nan")
    bias = torch.zeros(1, 70, device=device)
    bias[:, 50:] = float("nan")
    lens = dict(q_lens=torch.tensor([30], dtype=torch.int32, device=device),
                kv_lens=torch.tensor([50], dtype=torch.int32, device=device))  # fmt: skip
    out, lse = op(q, k, v, q_scale, k_scale, v_scale, key_bias=bias, **lens)
    short, short_lse = op(q[:, :30], k[:, :50], v[:, :50], q_scale[:, :30], k_scale[:, :50], v_scale[:, :50])
    torch.testing.assert_close(out[:, :30], short, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(lse[..., :30], short_lse)
    assert not out[:, 30:].any() and (lse[..., 30:] == -INF).all()
    kv_index = torch.arange(70, dtype=torch.int32, device=device)[None].clone()
    kv_index[:, 50:] = -1
    indexed, _ = op(q[:, :30], k, v, q_scale[:, :30], k_scale, v_scale, key_bias=bias, kv_index=kv_index)
    torch.testing.assert_close(indexed, short, rtol=1e-2, atol=1e-3)


def with_nan_beyond(v):
    """v in panels, with NaN beyond its last key."""
    panels = in_panels(v)
    if v.shape[1] % PANEL:
        panels.view(torch.uint8)[:, -1, ..., v.shape[1] % PANEL :] = 0x7F
    return panels


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 128, 190, 256, 300])
def test_values_in_panels(backend, dim, poison, random, integers, device, keys):
    q, k, v, *scales = factors(random, device, 2, 35, keys, 2, dim, 1)
    panels, bias = with_nan_beyond(v), random(2, keys).to(device)
    a, b = op(q, k, v, *scales), check(q, k, panels, *scales)
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    check(q, k, panels, *scales, key_bias=bias, kv_index=integers(-1, keys, (2, 77), device))
    lens = torch.tensor([keys, keys // 2], dtype=torch.int32, device=device)
    check(q, k, panels, *scales, key_bias=bias, kv_lens=lens)


def test_other_strides(backend, dim, poison, random, device):
    q, k, v, *scales = factors(random, device, 2, 50, 100, 3, dim)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, *scales)]
    bias = random(2, 160).to(device)[:, 7:107]
    c = check(*heads_first, key_bias=bias)
    assert c[0].isfinite().all()
    panels = with_nan_beyond(v).view(torch.uint8)
    roomy = torch.full((2, 3, 4, dim + 1, 80), 0x7F, dtype=torch.uint8, device=device)
    roomy[:, :3, :2, :dim, 16:].transpose(1, 2).copy_(panels)
    for moved in (panels.permute(3, 2, 1, 0, 4).contiguous().permute(3, 2, 1, 0, 4),
                  roomy[:, :3, :2, :dim, 16:].transpose(1, 2)):  # fmt: skip
        d = check(q, k, moved.view(v.dtype), *scales, key_bias=bias)
        torch.testing.assert_close(d, c, rtol=1e-2, atol=1e-3)


def test_panels_far_apart(backend, dim, random, device):
    """Their stride does not fit into 32 bits. Memory that is not touched takes none on a CPU."""
    q, k, v, *scales = factors(random, device, 1, 20, 100, 2, dim)
    panels = with_nan_beyond(v)
    room = torch.empty(2**31 + panels.numel(), dtype=torch.uint8, device=device)
    far = room.as_strided(panels.shape, (2**31, 2**31, dim * PANEL, PANEL, 1)).copy_(panels.view(torch.uint8))
    check(q, k, far.view(v.dtype), *scales)


def test_scale(backend, dim, poison, random, device):
    call = factors(random, device, 1, 30, 40, 2, dim)
    for scale in (1.0,) if backend == "cuda" else (1.0, 0.0, -0.2):
        check(*call, scale=scale)
        check(*call, scale=scale, key_bias=multiplicities(1, 40, device))


def test_values_of_very_different_sizes(backend, dim, poison, random, device):
    """A scale of v that grows tile by tile, and keys without values."""
    q, k, v, q_scale, k_scale, v_scale = factors(random, device, 1, 30, 500, 2, dim)
    check(q, k, v, q_scale, k_scale, v_scale * torch.logspace(-6, 3, 500, device=device)[None, :, None], rms=0.05)
    check(q, k, v, q_scale, k_scale, v_scale * torch.logspace(3, -6, 500, device=device)[None, :, None], rms=0.05)
    v_scale[:, :300] = 0
    check(q, k, v, q_scale, k_scale, v_scale)


def test_large_scores(backend, dim, poison, random, device):
    q, k, v, q_scale, k_scale, v_scale = factors(random, device, 1, 30, 150, 2, dim)
    check(q, k, v, q_scale * 60, k_scale, v_scale, rms=0.05)


@pytest.mark.slow
def test_many_small_weights(backend, dim, random, device):
    """4000 keys that together outweigh one strong key: e4m3 without the shift would lose them all."""
    q, k, v, q_scale, k_scale, v_scale = factors(random, device, 1, 4, 4001, 1, dim)
    bias = torch.full((1, 4001), -5.0, device=device)
    bias[:, 0] = 4.0
    check(q, k, v, q_scale * 0.01, k_scale, v_scale * 0 + 0.01, key_bias=bias)


@pytest.mark.parametrize("zero", ["batch", "queries", "keys"])
def test_zero_sizes(backend, dim, poison, random, device, zero):
    sizes = (0 if zero == name else 3 for name in ("batch", "queries", "keys"))
    q, k, v, *scales = factors(random, device, *sizes, 2, dim)
    out, lse = op(q, k, v, *scales)
    assert out.shape == q.shape and lse.shape == (q.shape[0], 2, q.shape[1])
    assert not out.any() and (zero != "keys" or (lse == -INF).all())


@pytest.mark.slow
@pytest.mark.parametrize("queries, keys", [(64, 192), (200, 412), (130, 3216), (1000, 1600)])
@pytest.mark.parametrize("by_row", [False, True])
def test_values_as_sm_90_reads_them(backend, poison, random, integers, device, queries, keys, by_row):
    """V in panels, a multiple of 4 keys: whole and cut K tiles, splits, lengths that end inside them, rows of NaN."""
    if device.type == "cpu" and queries * keys > 20_000:
        pytest.skip("large, for a GPU")
    q, k, v, *scales = factors(random, device, 2, queries, keys, 4, 128, 2, True, by_row, by_row)
    bias, panels = random(2, keys).to(device), with_nan_beyond(v)
    check(q, k, panels, *scales)
    check(q, k, panels, *scales, key_bias=multiplicities(2, keys, device))
    check(q, k, panels, *scales, key_bias=bias, q_index=integers(-1, queries, (2, 150), device))
    kv_lens = torch.tensor([keys - 37, keys // 2 + 3], dtype=torch.int32, device=device)
    for b, length in enumerate(kv_lens.tolist()):
        for x in (k, v):
            x.view(torch.uint8)[b, length:] = 0x7F
        bias[b, length:] = float("nan")
    panels = with_nan_beyond(v)
    check(q, k, panels, *scales, key_bias=bias, kv_lens=kv_lens)
    check(q, k, panels, *scales, kv_lens=kv_lens, q_lens=torch.tensor([queries, 5], dtype=torch.int32, device=device))


@pytest.mark.slow
@pytest.mark.parametrize("splits", [2, 3, 8])
def test_splits(poison, random, integers, device, splits):
    """Parts of the keys, joined; some of them without any key."""
    kernel = pytest.importorskip("specedit_kernels.triton_kernels.mixed_res_attn_fp8")
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    q, k, v, *scales = factors(random, device, 2, 40, 300, 2, 64)
    bias, kv_lens = random(2, 300).to(device), torch.tensor([300, 20], dtype=torch.int32, device=device)
    index = integers(-1, 300, (2, 400), device)
    for given in ((None,) * 5, (bias, None, None, None, kv_lens), (bias, None, index, None, kv_lens)):
        one, parts = (kernel.launch(q, k, v, *scales, *given, 0.1, splits=n) for n in (1, splits))
        assert (one[0] - parts[0]).float().norm() < 0.05 * one[0].float().norm()
        torch.testing.assert_close(*(x[1] for x in (one, parts)), rtol=1e-5, atol=1e-5)
        again = kernel.launch(q, k, v, *scales, *given, 0.1, splits=splits)
        assert torch.equal(again[0], parts[0]) and torch.equal(again[1], parts[1])


def test_near_attention_in_bf16(backend, random, device):
    """What all of it costs: rounding q, k and v to e4m3 as well."""
    x = [random(1, n, 2, 128) for n in (60, 400, 400)]
    exact = exact_attention(*(y.double() for y in x), *[None] * 9, 128**-0.5)[0]
    pairs = [[y.to(device) for y in quantised(y)] for y in x]
    out, _ = op(*(y for y, _ in pairs), *(s for _, s in pairs))
    assert (out.cpu().double() - exact).norm() < 0.08 * exact.norm()


def good():
    values, scale = quantised(torch.ones(1, 3, 2, 32))
    return dict(q=values, k=values, v=values, q_scale=scale, k_scale=scale, v_scale=scale)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(q=torch.ones(1, 3, 2, 32)), TypeError, "q: expected dtype float8_e4m3fn, got float32"),
        (dict(q=good()["q"][0]), ValueError, r"q: expected \[B, S, H, D\]"),
        (dict(q=good()["q"][..., :24]), ValueError, "q: expected a head dimension"),
        (dict(k=good()["k"][..., :16]), ValueError, r"k: expected shape \[B=1, S, Hk, D=32\]"),
        (dict(v=good()["v"][:, :2]), ValueError, r"k's shape \[1, 3, 2, 32\], or panels \[1, 1, 2, 32, 64\]"),
        (dict(v=torch.zeros(1, 2, 2, 32, 64).to(torch.float8_e4m3fn)), ValueError, "v: expected k's shape"),
        (dict(v=in_panels(good()["v"]).mT.contiguous().mT), ValueError, "v: expected a contiguous last dim"),
        (dict(v=good()["v"][0]), ValueError, r"v: expected \[B, S, H, D\]"),
        (dict(q_scale=torch.ones(1, 2, 2)), ValueError, r"q_scale: expected shape \[1, 3, 2\], a sca.* \[1, 1, 2\]"),
        (dict(k_scale=torch.ones(1, 3, 2, 1)), ValueError, "k_scale: expected shape"),
        (dict(v_scale=torch.ones(1, 3, 2).double()), TypeError, "v_scale: expected dtype float32"),
        (dict(key_bias=torch.zeros(1, 2)), ValueError, r"key_bias: expected shape \[1, 3\]"),
        (dict(kv_index=torch.tensor([[0, 3]]).int()), ValueError, "kv_index: expected values from -1 to 2"),
        (dict(q_index=torch.tensor([[0]])), TypeError, "q_index: expected dtype int32"),
        (dict(kv_lens=torch.zeros(2).int()), ValueError, r"kv_lens: expected shape \[B=1\]"),
        (dict(scale=float("nan")), ValueError, "scale: expected a finite number"),
    ],
)  # fmt: skip
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        op(**(good() | change))


def test_devices_that_it_needs(monkeypatch):
    from specedit_kernels.ops import _backends

    monkeypatch.setattr(_backends, "_capability", lambda index: (8, 6))
    found = _backends.choose("mixed_res_attn_fp8", torch.device("cuda", 0))
    assert found[0] == "reference" and "needs compute capability 8.9, cuda:0 has 8.6" in found[1]
    assert _backends.choose("merge_attn", torch.device("cuda", 0))[0] == "triton"


def test_an_extension_from_before_this_kernel(monkeypatch):
    """It serves the ops whose kernels it has; this one Triton does, and whoever forces it is told why not."""
    from specedit_kernels import _extension
    from specedit_kernels.ops import _backends

    device = torch.device("cuda", 0)
    monkeypatch.setattr(_backends, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(_extension, "load", lambda: (True, ""))
    monkeypatch.setattr(_extension, "architectures", lambda: "90a")
    monkeypatch.setattr(_extension, "_registered", lambda stem: stem != "mixed_res_attn_fp8")
    _extension.has_kernel.cache_clear()
    try:
        assert _backends.choose("mixed_res_attn", device)[0] == "cuda"
        assert _backends.choose("mixed_res_attn_scatter_", device)[0] == "cuda"
        backend, reason = _backends.choose("mixed_res_attn_fp8", device)
        assert backend == "triton" and "older build" in reason
        monkeypatch.setenv("SPECEDIT_BACKEND", "mixed_res_attn_fp8=cuda")
        with pytest.raises(RuntimeError, match="older build, without this op's kernel"):
            _backends.choose("mixed_res_attn_fp8", device)
        monkeypatch.delenv("SPECEDIT_BACKEND")
        monkeypatch.setattr(_extension, "_registered", lambda stem: True)
        _extension.has_kernel.cache_clear()
        assert _backends.choose("mixed_res_attn_fp8", device)[0] == "cuda"
    finally:
        _extension.has_kernel.cache_clear()
