# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from budget import assert_within_budget

from specedit_kernels.reference.sparse_cross_attn import sparse_cross_attn as reference

INF = float("inf")
pytestmark = pytest.mark.usefixtures("no_interpreted_bf16")


def eager(q, k, v, region, text_mask, scale):
    """The same attention in PyTorch at the inputs' dtype."""
    if text_mask.shape[1] == 0:
        text_mask = text_mask.new_zeros((q.shape[0], 1, k.shape[1]))
    rows = region.clamp(min=0).long()[:, :, None].expand(-1, -1, text_mask.shape[2])
    sees = text_mask.gather(1, rows) & (region >= 0)[:, :, None]
    score = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * scale).masked_fill(~sees[:, None], -INF)
    lse = score.float().logsumexp(-1)
    weight = score.softmax(-1).nan_to_num(0)
    return (weight @ v.transpose(1, 2)).transpose(1, 2), lse


def check(q, k, v, region, text_mask, scale=None):
    out, lse = torch.ops.specedit.sparse_cross_attn(q, k, v, region, text_mask, scale=scale)
    assert out.is_contiguous() and lse.is_contiguous()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    want_out, want_lse = reference(q.double(), k.double(), v.double(), region, text_mask, scale)
    eager_out, eager_lse = eager(q, k, v, region, text_mask, scale)
    assert_within_budget(out, want_out, eager_out, "out")
    assert_within_budget(lse, want_lse, eager_lse, "lse")
    return out, lse


@pytest.fixture
def call(random, integers, device):
    """Arguments of a call: `regions` regions over the queries, a third of the queries without one."""

    def make(queries=40, tokens=70, heads=2, dim=64, regions=3, batch=2, share=0.3, dtype=torch.float32):
        q, k, v = (random(batch, n, heads, dim, dtype=dtype, device=device) for n in (queries, tokens, tokens))
        region = (
            integers(-1, max(regions, 1), (batch, queries), device)
            if regions
            else torch.full((batch, queries), -1, dtype=torch.int32, device=device)
        )
        region[:, ::3] = -1
        mask = integers(0, 1000, (batch, regions, tokens), device) < 1000 * share
        return q, k, v, region, mask

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("queries, tokens", [(1, 1), (7, 99), (99, 7), (127, 129), (33, 512)])
def test_odd_lengths(backend, poison, call, queries, tokens, dtype):
    check(*call(queries, tokens, dtype=dtype))


@pytest.mark.parametrize("queries, tokens, heads", [(1100, 5, 2), (4200, 3, 1), (9, 4200, 1), (70, 40, 40)])
def test_long_lists_and_many_heads(backend, poison, call, queries, tokens, heads):
    q, k, v, region, mask = call(queries, tokens, heads=heads, dim=16, regions=2, batch=1)
    region[:, 200 : queries - 50] = -1
    check(q, k, v, region, mask)


@pytest.mark.parametrize("dim", [16, 48, 96, 128, 256])
def test_head_dimensions(backend, poison, call, dim):
    check(*call(dim=dim, batch=1))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 1.0])
def test_from_few_tokens_to_all(backend, poison, call, share):
    check(*call(tokens=200, share=share))


@pytest.mark.parametrize("seen", [0, 1, 32, 33, 64, 65, 129])
@pytest.mark.parametrize("size", ["small", "large"])
def test_tiles_of_tokens(backend, poison, call, size, seen, monkeypatch):
    """Lists that fill a tile or have one token more, with the tiles of either size of device."""
    if backend == "triton":
        from specedit_kernels.triton_kernels import sparse_cross_attn as kernel

        device = kernel._device(torch.cuda.current_device() if torch.cuda.is_available() else None)
        configs = kernel.CONFIGS["small"] | kernel.CONFIGS[size]
        monkeypatch.setattr(kernel, "_device", lambda index: (*device[:2], configs))
    q, k, v, region, mask = call(queries=140, tokens=150, dim=128, regions=2, batch=1, dtype=torch.float16)
    mask[:, 0] = torch.arange(150, device=mask.device) < seen
    mask[:, 1] = torch.arange(150, device=mask.device).flip(0) < seen
    check(q, k, v, region, mask)


@pytest.mark.slow
def test_scale(backend, poison, call):
    check(*call(), scale=0.4)
    check(*call(), scale=-0.4)
    check(*call(), scale=0.0)


def test_queries_that_see_nothing(backend, poison, call):
    q, k, v, region, mask = call(regions=3)
    mask[:, 1] = False
    out, lse = check(q, k, v, region, mask)
    blind = (region < 0) | (region == 1)
    assert blind.any() and not blind.all()
    assert not out[blind].any()
    assert (lse.transpose(1, 2)[blind] == -INF).all() and lse.transpose(1, 2)[~blind].isfinite().all()


@pytest.mark.parametrize("regions", [0, 1, 9])
def test_numbers_of_regions(backend, poison, call, regions):
    check(*call(regions=regions))


def test_one_region_everywhere(backend, poison, call):
    q, k, v, region, mask = call(queries=65, regions=1)
    out, lse = check(q, k, v, torch.zeros_like(region), torch.ones_like(mask))
    whole = torch.ops.specedit.mixed_res_attn(q, k, v)
    torch.testing.assert_close(out, whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, whole[1], rtol=1e-5, atol=1e-5)


def test_what_no_one_sees_is_not_read(backend, poison, call):
    q, k, v, region, mask = call(tokens=90)
    want = torch.ops.specedit.sparse_cross_attn(q, k, v, region, mask)
    unseen = ~mask.any(1)
    assert unseen.any()
    k[unseen], v[unseen], q[region < 0] = (float("nan"),) * 3
    for got, expected in zip(torch.ops.specedit.sparse_cross_attn(q, k, v, region, mask), want):
        assert torch.equal(got, expected)


def test_regions_do_not_share_nan(backend, poison, call):
    """A token that another region sees is not read for this one's queries: 0 * NaN is not 0."""
    q, k, v, region, mask = call(regions=2, batch=1)
    mask[:, 0, 40:], mask[:, 1, :40] = False, False
    want = torch.ops.specedit.sparse_cross_attn(q, k, v, region, mask)
    k[:, 40:50], v[:, 50:] = float("nan"), float("inf")
    got = torch.ops.specedit.sparse_cross_attn(q, k, v, region, mask)
    for a, b in zip(got, want):
        a, b = (x if x.shape == q.shape else x.transpose(1, 2) for x in (a, b))
        assert torch.equal(a[region == 0], b[region == 0])


@pytest.mark.slow
@pytest.mark.parametrize("score", [1e4, -1e4, 4e8, -4e8, -1e28, 1e31, -1e31], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [0.125, -0.125])
def test_scores_of_any_size(backend, poison, call, dtype, score, scale):
    """Of equal keys the result is the mean of what is seen, and lse finite."""
    if dtype == torch.float16 and abs(score) > 5e8:
        pytest.skip("no such score of fp16 rows")
    q, k, v, region, mask = call(regions=2, tokens=90, dtype=dtype)
    q.zero_(), k.zero_()
    q[..., 0] = math.copysign(math.sqrt(8 * abs(score)), score * scale)
    k[..., 0] = math.sqrt(8 * abs(score))
    out, lse = torch.ops.specedit.sparse_cross_attn(q, k, v, region, mask, scale=scale)
    exact = float(q[0, 0, 0, 0].double() * k[0, 0, 0, 0].double() * scale)
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for b, i in (region >= 0).nonzero():
        sees = mask[b, region[b, i]]
        torch.testing.assert_close(out[b, i].double(), v[b, sees].double().mean(0), rtol=tolerance, atol=tolerance)
        want = torch.full_like(lse[b, :, i], exact + math.log(int(sees.sum())))
        torch.testing.assert_close(lse[b, :, i], want, rtol=1e-6, atol=1e-5)


def test_a_region_does_not_see_anothers_tokens(backend, poison, call):
    q, k, v, region, mask = call(regions=2, batch=1)
    mask[:, 0, 40:], mask[:, 1, :40] = False, False
    want = torch.ops.specedit.sparse_cross_attn(q, k, v, region, mask)[0]
    v[:, 40:] += 5
    got = torch.ops.specedit.sparse_cross_attn(q, k, v, region, mask)[0]
    assert torch.equal(got[region == 0], want[region == 0])
    assert not torch.equal(got[region == 1], want[region == 1])


def test_strides(backend, poison, call):
    q, k, v, region, mask = call(queries=40, tokens=60)
    qkv = torch.cat([k, v, v], 2).chunk(3, 2)
    check(q.transpose(1, 2).contiguous().transpose(1, 2), qkv[0], qkv[1], region, mask)
    check(q[:, ::2], k[:, ::2], v[:, 1::2], region[:, ::2], mask.repeat(1, 2, 1)[:, ::2, :30])


@pytest.mark.slow
def test_joins_into_the_joint_softmax(backend, call, random, device):
    """merge_attn of image and text halves = one softmax over both, where every query sees the same text."""
    q, k, v, region, mask = call(queries=50, tokens=40, regions=1)
    region.zero_()
    image = [random(2, 50, 2, 64, device=device) for _ in range(2)]
    dense = torch.ops.specedit.mixed_res_attn(q, *image)
    sparse = torch.ops.specedit.sparse_cross_attn(q, k, v, region, mask)
    bias = torch.zeros(2, 50, device=device), torch.zeros(2, 40, device=device).masked_fill(~mask[:, 0], -INF)
    joint = torch.ops.specedit.mixed_res_attn(
        q, torch.cat([image[0], k], 1), torch.cat([image[1], v], 1), key_bias=torch.cat(bias, 1)
    )
    for got, expected in zip(torch.ops.specedit.merge_attn(*dense, *sparse), joint):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries, tokens, batch", [(0, 5, 2), (5, 0, 2), (5, 5, 0)])
def test_empty(backend, device, queries, tokens, batch):
    q, k = (torch.zeros(batch, n, 2, 32, device=device) for n in (queries, tokens))
    region = torch.zeros(batch, queries, dtype=torch.int32, device=device)
    mask = torch.ones(batch, 1, tokens, dtype=torch.bool, device=device)
    out, lse = torch.ops.specedit.sparse_cross_attn(q, k, k, region, mask)
    assert out.shape == q.shape and lse.shape == (batch, 2, queries)
    assert not out.any() and (lse == -INF).all()


@pytest.mark.gpu  # only a kernel gets such a region: the CPU refuses it
def test_unknown_regions_see_nothing(call):
    q, k, v, region, mask = call(regions=2)
    region[:, 5], region[:, 6] = 2, -7
    out, lse = torch.ops.specedit.sparse_cross_attn(q, k, v, region, mask)
    assert not out[:, 5:7].any() and (lse[:, :, 5:7] == -INF).all()


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(q=torch.zeros(1, 4, 64)), ValueError, r"q: expected shape \[B, Sq, H, D\]"),
        (dict(q=torch.zeros(1, 4, 2, 20)), ValueError, "q: expected a head dimension that is a multiple of 16"),
        (dict(k=torch.zeros(1, 6, 1, 64)), ValueError, r"k: expected shape \[1, St, 2, 64\]"),
        (dict(v=torch.zeros(1, 5, 2, 64)), ValueError, "v: expected k's shape"),
        (dict(v=torch.zeros(1, 6, 2, 64).half()), TypeError, "v: expected q's dtype"),
        (dict(region=torch.zeros(1, 4)), TypeError, "region: expected dtype int32"),
        (dict(region=torch.zeros(1, 3, dtype=torch.int32)), ValueError, r"region: expected shape \[1, 4\]"),
        (dict(region=torch.full((1, 4), 1, dtype=torch.int32)), ValueError, "region: expected values from -1 to 0"),
        (dict(text_mask=torch.ones(1, 1, 6)), TypeError, "text_mask: expected dtype bool"),
        (dict(text_mask=torch.ones(1, 6, dtype=torch.bool)), ValueError, r"text_mask: expected shape \[1, R, 6\]"),
        (dict(q=torch.zeros(1, 4, 2, 64, requires_grad=True)), ValueError, "q: expected a tensor that does not requi"),
    ],
)
def test_bad_input(change, error, words):
    call = (
        dict(
            q=torch.zeros(1, 4, 2, 64),
            k=torch.zeros(1, 6, 2, 64),
            v=torch.zeros(1, 6, 2, 64),
            region=torch.zeros(1, 4, dtype=torch.int32),
            text_mask=torch.ones(1, 1, 6, dtype=torch.bool),
        )
        | change
    )
    with pytest.raises(error, match=words):
        torch.ops.specedit.sparse_cross_attn(*call.values())
