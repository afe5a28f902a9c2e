# SPDX-License-Identifier: Apache-2.0
import importlib
import math
import os

import pytest
import torch
from budget import assert_within_budget
from combinations import ALL

from specedit_kernels.reference.mixed_res_attn import mixed_res_attn as reference

OPTIONS = (
    "key_bias",
    "q_index",
    "kv_index",
    "q_lens",
    "kv_lens",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "scale",
)
INF = float("inf")
pytestmark = pytest.mark.usefixtures("no_interpreted_bf16")


@pytest.fixture(autouse=True)
def _what_the_kernel_takes(request):
    """The CUDA C++ kernel leaves some calls to Triton; what it refuses is tested by its own test."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if params.get("backend") == "cuda":
        if params.get("dtype") is torch.float32 or params.get("dim", 64) not in (64, 128):
            pytest.skip("not a call of the CUDA C++ kernel")


def usual_dtype():
    """fp32, which shows every mistake, but for the backend that does not take it."""
    return torch.float16 if os.environ.get("SPECEDIT_BACKEND") == "cuda" else torch.float32


def assert_same(a, b):
    """Two ways to one result, which differ by the order of sums alone (in 16 bits: and by a rounding)."""
    tolerance = 4e-3 if usual_dtype() is torch.float16 else 1e-5
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def oracle(q, k, v, **options):
    """The reference in float64 on the rounded inputs; itself held against a plain loop below."""
    options = {name: options.get(name) for name in OPTIONS}
    if options["scale"] is None:
        options["scale"] = q.shape[-1] ** -0.5
    if options["key_bias"] is not None:
        options["key_bias"] = options["key_bias"].double()
    return reference(q.double(), k.double(), v.double(), **options)


def eager(q, k, v, key_bias=None, q_index=None, kv_index=None, q_lens=None, kv_lens=None, scale=None):
    """Attention as plain PyTorch writes it at q's dtype (padded layout), for the error budget."""
    rows = torch.arange(q.shape[0], device=q.device)[:, None]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries, keys = q.shape[1], k.shape[1]
    removed = torch.zeros(q.shape[0], keys, dtype=torch.bool, device=q.device)
    empty = torch.zeros(q.shape[0], queries, dtype=torch.bool, device=q.device)
    if q_index is not None:
        q, empty = q[rows, q_index.clamp_min(0).long()], q_index < 0
    bias = torch.zeros(k.shape[:2], device=q.device) if key_bias is None else key_bias
    if kv_index is not None:
        at = kv_index.clamp_min(0).long()
        k, v, bias, removed = k[rows, at], v[rows, at], bias[rows, at], kv_index < 0
    if kv_lens is not None:
        removed = removed | (torch.arange(k.shape[1], device=q.device) >= kv_lens[:, None])
    if q_lens is not None:
        empty = empty | (torch.arange(q.shape[1], device=q.device) >= q_lens[:, None])
    bias = bias.masked_fill(removed, -INF)
    k, v = (
        x.masked_fill(removed[:, :, None, None], 0).repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2)
        for x in (k, v)
    )
    score = q.transpose(1, 2) @ k.transpose(2, 3) * scale + bias.to(q.dtype)[:, None, None]
    out = (score.softmax(-1).nan_to_num(0) @ v).transpose(1, 2)
    lse = score.logsumexp(-1)
    return (
        out.masked_fill(empty[:, :, None, None], 0),
        lse.masked_fill(empty[:, None], -INF).float(),
    )


def check(q, k, v, luck=1.0, **options):
    out, lse = torch.ops.specedit.mixed_res_attn(q, k, v, **options)
    assert out.is_contiguous() and lse.is_contiguous() and lse.dtype == torch.float32
    want_out, want_lse = oracle(q, k, v, **options)
    eager_out, eager_lse = eager(q, k, v, **options)
    assert_within_budget(out, want_out, eager_out, "out", luck)
    assert_within_budget(lse, want_lse, eager_lse, "lse", luck)
    return out, lse


def scattered(out, rows, index):
    """A copy of ``out`` with row i of ``rows`` at index[b, i]; -1 = nowhere."""
    out = out.clone()
    for b, row in enumerate(index):
        out[b, row[row >= 0].long()] = rows[b, row >= 0]
    return out


def qkv(random, device, batch, queries, keys, heads, dim, kv_heads=None, dtype=None):
    kv_heads, dtype = kv_heads or heads, dtype or usual_dtype()
    return (
        random(batch, queries, heads, dim, dtype=dtype, device=device),
        random(batch, keys, kv_heads, dim, dtype=dtype, device=device),
        random(batch, keys, kv_heads, dim, dtype=dtype, device=device),
    )


def multiplicities(batch, keys, device):
    """log 1 for the first half of the keys, log 4 for the rest."""
    bias = torch.zeros(batch, keys)
    bias[:, keys // 2 :] = math.log(4)
    return bias.to(device)


def test_the_oracle_is_the_definition(random):
    """The reference in float64 against the contract written as a loop over queries and keys."""
    q, k, v = (x.double() for x in qkv(random, "cpu", 2, 3, 4, 4, 16, 2))
    bias = torch.tensor([[0.0, 1.0, -INF, 2.0], [-INF] * 4]).double()
    out, lse = reference(q, k, v, bias, None, None, None, None, None, None, None, None, 0.3)
    for b in range(2):
        for i in range(3):
            for h in range(4):
                weights = [math.exp(0.3 * float(q[b, i, h] @ k[b, j, h // 2]) + float(bias[b, j])) for j in range(4)]
                total = sum(weights)
                if total == 0:
                    assert lse[b, h, i] == -INF and not out[b, i, h].any()
                    continue
                expected = sum(w * v[b, j, h // 2] for j, w in enumerate(weights)) / total
                torch.testing.assert_close(out[b, i, h], expected, rtol=1e-12, atol=1e-12)
                assert abs(float(lse[b, h, i]) - math.log(total)) < 1e-12


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 397), (7, 7), (99, 127), (127, 99), (397, 1), (130, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_odd_lengths(backend, poison, random, device, queries, keys, dtype):
    q, k, v = qkv(random, device, 1, queries, keys, 2, 64, dtype=dtype)
    check(q, k, v, key_bias=multiplicities(1, keys, device))
    check(q, k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [16, 48, 64, 96, 128, 256])
def test_head_dimensions(backend, poison, random, device, dim, dtype):
    check(*qkv(random, device, 1, 70, 90, 2, dim, dtype=dtype), key_bias=multiplicities(1, 90, device))


@pytest.mark.parametrize("heads, kv_heads", [(4, 1), (6, 2), (6, 3)])
def test_grouped_queries(backend, poison, random, device, heads, kv_heads):
    check(*qkv(random, device, 2, 33, 65, heads, 64, kv_heads), key_bias=multiplicities(2, 65, device))


@pytest.mark.slow
def test_arbitrary_bias(backend, poison, random, device):
    q, k, v = qkv(random, device, 2, 40, 150, 2, 64)
    bias = random(2, 150, device=device) * 5
    bias[:, ::7] = -INF
    check(q, k, v, key_bias=bias)
    check(q, k, v, key_bias=bias + 1000, luck=3)
    check(q, k, v, key_bias=bias - 1000, luck=3)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [-1e4, -1e9, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_mask_of_any_size_removes_keys(backend, poison, random, device, dtype, mask):
    """As if they were not there: also the first keys, and whatever the dtype of q can hold."""
    q, k, v = qkv(random, device, 1, 35, 300, 2, 64, dtype=dtype)
    bias = random(1, 300).to(device)
    kept = torch.arange(300, device=device) % 3 > 0
    kept[:140] = False
    bias[:, ~kept] = mask
    out, lse = check(q, k, v, key_bias=bias)
    rest, rest_lse = torch.ops.specedit.mixed_res_attn(
        q, k[:, kept].contiguous(), v[:, kept].contiguous(), key_bias=bias[:, kept].contiguous()
    )
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(out, rest, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, rest_lse, rtol=1e-4, atol=1e-4)


def far_biases(far, order, keys):
    """fp32 [1, keys] of the size of ``far``: all alike, of three sizes in turn, rising from tile to tile, or first."""
    bias = torch.full((1, keys), far)
    if order == "mixed":
        bias /= 1 + torch.arange(keys) % 3
    elif order == "rising" and math.isfinite(far):
        bias *= torch.linspace(1, 0.5, keys) if far < 0 else torch.linspace(0.5, 1, keys)
    elif order == "first":
        bias[:, keys // 2 :] = 0
    return bias


FAR = [-1e2, -1e4, -1e9, -3e38, torch.finfo(torch.float32).min, -INF, 1e4, 1e9, 3e38]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["alike", "mixed", "rising", "first"])
@pytest.mark.parametrize("far", FAR, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_biases_of_any_size(backend, poison, random, device, dtype, far, order):
    """The softmax of the scores as fp32 holds them: beside a bias of 1e9 it holds no more than steps of 64."""
    for dim in [64, 128] if ALL else [64 if (FAR.index(far) + len(order)) % 2 else 128]:
        _far(*qkv(random, device, 1, 20, 300, 1, dim, dtype=dtype), far, order)


def _far(q, k, v, far, order):
    dtype, device, dim = q.dtype, q.device, q.shape[-1]
    bias = far_biases(far, order, 300).to(device)
    out, lse = torch.ops.specedit.mixed_res_attn(q, k, v, key_bias=bias)
    score = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * dim**-0.5 + bias.double()
    score = score.clamp(*(sign * torch.finfo(torch.float32).max for sign in (-1, 1))) if far != -INF else score
    score = score.float().double()
    want = torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1).nan_to_num(0), v.double())
    # What a score may be off by: a step of fp32 where that is less than the scores' own size.
    step = abs(far) * 1.2e-7 if abs(far) < 1e6 else 0.0
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype] + 4 * step
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), score.logsumexp(-1), rtol=1e-4, atol=1e-4 + step)


@pytest.mark.slow
@pytest.mark.parametrize("split_keys", [False, True])
@pytest.mark.parametrize("score", [1e4, -1e4, 4e8, -4e8, 1e30, -1e30], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_of_any_size(backend, poison, random, device, dtype, score, split_keys):
    """Of equal keys the result is the mean, without a bias too and however many keys a part of them has."""
    if dtype == torch.float16 and abs(score) > 5e8:
        pytest.skip("no such score of fp16 rows")
    q, k, v = (x.zero_() if i < 2 else x for i, x in enumerate(qkv(random, device, 1, 20, 700, 2, 64, dtype=dtype)))
    q[..., 0], k[..., 0] = math.copysign(math.sqrt(8 * abs(score)), score), math.sqrt(8 * abs(score))
    if split_keys:
        if backend != "triton":
            pytest.skip("the others cut the keys as they see fit")
        kernel = importlib.import_module("specedit_kernels.triton_kernels.mixed_res_attn")
        out = torch.empty_like(q)
        lse = kernel._launch(out, None, q, k, v, *(None,) * 9, 0.125, splits=3)
    else:
        out, lse = torch.ops.specedit.mixed_res_attn(q, k, v)
    want = v.double().mean(1, keepdim=True).expand_as(out)
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    exact = float(q[0, 0, 0, 0].double() * k[0, 0, 0, 0].double() / 8)
    torch.testing.assert_close(lse, torch.full_like(lse, exact + math.log(700)), rtol=1e-6, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("far", [-1e9, -3e38, 1e9], ids=str)
@pytest.mark.parametrize("scatter", [False, True])
def test_parts_of_far_keys_weigh_as_much_as_they_are(random, device, far, scatter):
    """Keys in parts of unequal numbers, all of one far bias: the join has no logarithm that rounding could empty."""
    kernel = pytest.importorskip("specedit_kernels.triton_kernels.mixed_res_attn")
    q, k, v = qkv(random, device, 1, 20, 1000, 2, 64, dtype=torch.float16)
    bias = torch.full((1, 1000), far, device=device)
    index = torch.arange(20, dtype=torch.int32, device=device).flip(0)[None].contiguous() if scatter else None
    out = torch.empty_like(q)
    lse = kernel._launch(out, index, q, k, v, bias, *(None,) * 8, 0.125, splits=3)
    want = v.double().mean(1, keepdim=True).expand_as(out)
    torch.testing.assert_close(out.double(), want, rtol=3e-3, atol=3e-3)
    torch.testing.assert_close(lse, torch.full_like(lse, far), rtol=1e-6, atol=0)


def test_removed_keys_take_no_part(backend, poison, random, device):
    q, k, v = qkv(random, device, 1, 20, 200, 2, 64)
    bias = torch.zeros(1, 200, device=device)
    bias[:, 3:190] = -INF
    kept = torch.cat([torch.arange(3), torch.arange(190, 200)]).to(device)
    out, lse = check(q, k, v, key_bias=bias)
    short, short_lse = torch.ops.specedit.mixed_res_attn(q, k[:, kept], v[:, kept])
    assert_same(out, short)
    assert_same(lse, short_lse)
    bias[:] = -INF
    out, lse = check(q, k, v, key_bias=bias)
    assert not out.any() and (lse == -INF).all()


def test_a_coarse_key_weighs_as_its_fine_ones(backend, random, device):
    """Four equal keys are one key with bias log 4: the reason for key_bias."""
    q, k, v = qkv(random, device, 1, 25, 12, 2, 64)
    repeated = [torch.cat([x[:, :6], x[:, 6:].repeat_interleave(4, 1)], 1) for x in (k, v)]
    fine, fine_lse = torch.ops.specedit.mixed_res_attn(q, *repeated)
    mixed, mixed_lse = torch.ops.specedit.mixed_res_attn(q, k, v, key_bias=multiplicities(1, 12, device))
    assert_same(mixed, fine)
    assert_same(mixed_lse, fine_lse)


@pytest.mark.slow
def test_gather_of_rows(backend, poison, random, integers, device):
    q, k, v = qkv(random, device, 2, 50, 80, 2, 64)
    bias = random(2, 80, device=device)
    check(q, k, v, key_bias=bias, q_index=integers(-1, 50, (2, 33), device))
    check(q, k, v, key_bias=bias, kv_index=integers(-1, 80, (2, 141), device))
    check(q, k, v, q_index=integers(-1, 50, (2, 7), device), kv_index=integers(-1, 80, (2, 1), device))
    empty = torch.full((2, 9), -1, dtype=torch.int32, device=device)
    check(q, k, v, key_bias=bias, q_index=empty)
    check(q, k, v, key_bias=bias, kv_index=empty)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("with_lens", [False, True])
def test_keys_that_many_tiles_of_queries_gather(backend, poison, random, integers, device, dim, dtype, with_lens):
    """So many that the CUDA kernel has them gathered before it: 8 heads a key head, 3 tiles of 128 queries."""
    batch = 2 if with_lens else 1
    queries = (270, 8) if device.type == "cuda" else (70, 3)
    q, k, v = (random(batch, n, h, dim, dtype=dtype, device=device) for n, h in (queries, (90, 1), (90, 1)))
    index = integers(-1, 90, (batch, 141), device)
    if with_lens:
        check(q, k, v, kv_index=index, kv_lens=torch.tensor([140, 31], dtype=torch.int32, device=device))
    else:
        check(q, k, v, key_bias=random(batch, 90, device=device), kv_index=index)


def test_empty_slots_read_nothing(backend, poison, random, device):
    """Rows that no slot names may hold NaN, in k, v and q."""
    q, k, v = qkv(random, device, 1, 40, 70, 2, 64)
    q[:, 30:], k[:, 50:], v[:, 50:] = (float("nan"),) * 3
    lens = dict(
        q_lens=torch.tensor([30], dtype=torch.int32, device=device),
        kv_lens=torch.tensor([50], dtype=torch.int32, device=device),
    )
    out, _ = torch.ops.specedit.mixed_res_attn(q, k, v, **lens)
    short, _ = torch.ops.specedit.mixed_res_attn(q[:, :30], k[:, :50], v[:, :50])
    assert_same(out[:, :30], short)
    assert not out[:, 30:].any()
    kv_index = torch.arange(70, dtype=torch.int32, device=device)[None].clone()
    kv_index[:, 50:] = -1
    indexed, _ = torch.ops.specedit.mixed_res_attn(q[:, :30], k, v, kv_index=kv_index)
    assert_same(indexed, short)


@pytest.mark.slow
def test_gather_of_all_is_dense(backend, random, device):
    q, k, v = qkv(random, device, 2, 45, 77, 2, 64)
    bias = random(2, 77, device=device)
    dense = torch.ops.specedit.mixed_res_attn(q, k, v, key_bias=bias)
    all_q = torch.arange(45, dtype=torch.int32, device=device).expand(2, -1)
    all_k = torch.arange(77, dtype=torch.int32, device=device).expand(2, -1)
    gathered = torch.ops.specedit.mixed_res_attn(q, k, v, key_bias=bias, q_index=all_q, kv_index=all_k)
    for a, b in zip(gathered, dense):
        assert_same(a, b)


def test_order_of_keys_does_not_matter(backend, random, device):
    q, k, v = qkv(random, device, 1, 45, 77, 2, 64)
    bias = random(1, 77, device=device)
    order = torch.randperm(77, generator=torch.Generator().manual_seed(3)).int().to(device)[None]
    a = torch.ops.specedit.mixed_res_attn(q, k, v, key_bias=bias)
    b = torch.ops.specedit.mixed_res_attn(q, k, v, key_bias=bias, kv_index=order)
    for x, y in zip(a, b):
        assert_same(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("q_lens, kv_lens", [([40, 7], [1, 90]), ([0, 40], [90, 0]), ([99, 1], [64, 999])], ids=str)
def test_device_side_lengths(backend, poison, random, device, q_lens, kv_lens):
    q, k, v = qkv(random, device, 2, 40, 90, 2, 64)
    bias = random(2, 90, device=device)
    q_lens = torch.tensor(q_lens, dtype=torch.int32, device=device)
    kv_lens = torch.tensor(kv_lens, dtype=torch.int32, device=device)
    check(q, k, v, key_bias=bias, q_lens=q_lens, kv_lens=kv_lens)
    check(q, k, v, q_lens=q_lens)
    check(q, k, v, kv_lens=kv_lens)


def test_lengths_count_slots_of_an_index(backend, poison, random, integers, device):
    q, k, v = qkv(random, device, 2, 40, 90, 2, 64)
    lens = torch.tensor([5, 20], dtype=torch.int32, device=device)
    check(
        q,
        k,
        v,
        key_bias=random(2, 90, device=device),
        q_index=integers(-1, 40, (2, 25), device),
        kv_index=integers(-1, 90, (2, 33), device),
        q_lens=lens,
        kv_lens=lens + 3,
    )


@pytest.mark.slow
def test_strides(backend, poison, random, device):
    """Heads before rows, a slice of a packed qkv, a sliced bias."""
    dtype = usual_dtype()
    q, k, v = (random(2, 3, 50, 64, dtype=dtype, device=device).transpose(1, 2) for _ in range(3))
    check(q, k, v, key_bias=random(2, 120, device=device)[:, 7:57])
    packed = random(2, 50, 3, 3, 64, dtype=dtype, device=device)
    check(packed[:, :, 0], packed[:, :, 1], packed[:, :, 2])
    wide = random(2, 50, 3, 80, dtype=dtype, device=device)
    start = 8 if backend == "cuda" else 5
    check(wide[:, ::2, :, start : start + 64], wide[:, 1::2, :, :64], wide[:, 1::2, :, 16:])


def test_scale(backend, poison, random, device):
    q, k, v = qkv(random, device, 1, 30, 40, 2, 64)
    for scale in (1.0, 0.01) if backend == "cuda" else (1.0, 0.0, -0.2):
        check(q, k, v, scale=scale)


def test_large_scores(backend, poison, random, device):
    """A softmax without its running maximum would overflow."""
    q, k, v = qkv(random, device, 1, 30, 150, 2, 64)
    check(q * 8, k * 8, v, luck=3)


@pytest.mark.parametrize("zero", ["batch", "queries", "keys"])
def test_zero_sizes(backend, poison, device, zero):
    batch, queries, keys = (0 if zero == name else 3 for name in ("batch", "queries", "keys"))
    q = torch.ones(batch, queries, 2, 64, dtype=usual_dtype(), device=device)
    k = torch.ones(batch, keys, 2, 64, dtype=usual_dtype(), device=device)
    out, lse = torch.ops.specedit.mixed_res_attn(q, k, k)
    assert out.shape == (batch, queries, 2, 64) and lse.shape == (batch, 2, queries)
    assert not out.any() and (lse.numel() == 0 or (lse == -INF).all() or zero != "keys")
    if zero == "keys":
        assert (lse == -INF).all()


@pytest.mark.slow
@pytest.mark.parametrize("lens", [([5, 0, 33, 1], [7, 9, 0, 64]), ([130, 3, 3, 3], [2, 150, 64, 1])], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_is_padded(backend, poison, random, device, lens, dtype):
    q_lens, k_lens = lens
    q, k, v = qkv(random, device, 1, sum(q_lens) + 4, sum(k_lens) + 4, 2, 64, 1, dtype=dtype)
    q, k, v = q[0], k[0], v[0]
    bias = random(k.shape[0], device=device)

    def starts(lengths):
        return torch.tensor([0, *lengths]).cumsum(0).int().to(device)

    cu_q, cu_k = starts(q_lens), starts(k_lens)
    call = dict(key_bias=bias, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max(q_lens), max_seqlen_k=max(k_lens))
    out, lse = torch.ops.specedit.mixed_res_attn(q, k, v, **call)
    assert out.shape == q.shape and lse.shape == (2, q.shape[0])
    want_out, want_lse = oracle(q, k, v, **call)
    for b in range(len(q_lens)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        one_out, one_lse = check(q[None, rows], k[None, keys], v[None, keys], key_bias=bias[None, keys])
        assert_within_budget(out[None, rows], want_out[None, rows], one_out)
        torch.testing.assert_close(lse[None, :, rows], one_lse, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(want_lse[None, :, rows].float(), one_lse, rtol=1e-2, atol=1e-2)
    # Rows past the last sequence are empty.
    assert not out[cu_q[-1] :].any() and (lse[:, cu_q[-1] :] == -INF).all()
    # Device-side lengths shorten a sequence.
    short = torch.tensor([2, 5, 1, 0], dtype=torch.int32, device=device)
    out, lse = torch.ops.specedit.mixed_res_attn(q, k, v, **call, q_lens=short, kv_lens=short)
    want_out, want_lse = oracle(q, k, v, **call, q_lens=short, kv_lens=short)
    torch.testing.assert_close(out.double(), want_out, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scatter_writes_only_its_rows(backend, poison, random, integers, device, dtype):
    q, k, v = qkv(random, device, 2, 40, 90, 2, 64, dtype=dtype)
    bias = random(2, 90, device=device)
    q_index = integers(-1, 40, (2, 33), device)
    q_lens = torch.tensor([30, 9], dtype=torch.int32, device=device)
    out_index = torch.stack([torch.randperm(60, generator=torch.Generator().manual_seed(b)) for b in range(2)]).int()
    out_index = out_index[:, :33].to(device)
    out_index[:, ::5] = -1
    options = dict(key_bias=bias, q_index=q_index, q_lens=q_lens)
    out = torch.full((2, 60, 2, 64), float("nan"), dtype=dtype, device=device)
    lse = torch.ops.specedit.mixed_res_attn_scatter_(out, q, k, v, out_index, **options)
    rows, rows_lse = torch.ops.specedit.mixed_res_attn(q, k, v, **options)
    assert torch.equal(lse, rows_lse)
    expected = scattered(torch.full_like(out, float("nan")), rows, out_index)
    assert torch.equal(out.nan_to_num(7777), expected.nan_to_num(7777))
    untouched = torch.ones(2, 60, dtype=torch.bool, device=device)
    for b in range(2):
        untouched[b, out_index[b][out_index[b] >= 0].long()] = False
    assert out[untouched].isnan().all() and not out[~untouched].isnan().any()


def test_scatter_into_a_strided_buffer(backend, random, device):
    q, k, v = qkv(random, device, 1, 20, 30, 2, 64)
    buffer = random(1, 50, 4, 64, dtype=usual_dtype(), device=device)
    before = buffer.clone()
    out_index = torch.arange(20, dtype=torch.int32, device=device)[None]
    torch.ops.specedit.mixed_res_attn_scatter_(buffer[:, 10:, 1:3], q, k, v, out_index)
    rows, _ = torch.ops.specedit.mixed_res_attn(q, k, v)
    assert_same(buffer[:, 10:30, 1:3], rows)
    buffer[:, 10:30, 1:3] = before[:, 10:30, 1:3]
    assert torch.equal(buffer, before)


@pytest.mark.slow
def test_deterministic(backend, random, device):
    q, k, v = qkv(random, device, 1, 130, 300, 2, 64, dtype=torch.float16)
    bias = random(1, 300, device=device)
    first = torch.ops.specedit.mixed_res_attn(q, k, v, key_bias=bias)
    for _ in range(3):
        again = torch.ops.specedit.mixed_res_attn(q, k, v, key_bias=bias)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.gpu  # calls overlap on a GPU alone
@pytest.mark.parametrize("queries, heads", [(300, 24), (128, 132)])
def test_a_call_waits_for_the_one_before(backend, random, device, queries, heads):
    """A kernel may start under the one before: here each reads what that one writes. Cut into parts, and not."""
    q, k, v = qkv(random, device, 1, queries, 3000, heads, 64, dtype=torch.float16)
    bias = multiplicities(1, 3000, device)

    def chain(between):
        x, target = q, torch.zeros_like(q)
        index = torch.arange(queries, dtype=torch.int32, device=device).flip(0)[None].contiguous()
        for _ in range(8):
            x = torch.ops.specedit.mixed_res_attn(x, k, v, key_bias=bias)[0]
            between()
            torch.ops.specedit.mixed_res_attn_scatter_(target, x, k, v, index, key_bias=bias)
            between()
            x = x + target
        return x

    chain(lambda: None)
    want = chain(torch.cuda.synchronize)
    for _ in range(5):
        assert torch.equal(chain(lambda: None), want)


@pytest.mark.gpu  # full sizes need a GPU
@pytest.mark.parametrize("queries, keys", [(8704, 8704), (922, 8704), (512, 5120)])
@pytest.mark.parametrize("dim, dtype", [(128, torch.bfloat16), (64, torch.float16)], ids=str)
def test_full_size(backend, poison, random, device, queries, keys, dim, dtype):
    check(*qkv(random, device, 1, queries, keys, 2, dim, dtype=dtype), key_bias=multiplicities(1, keys, device))


@pytest.mark.slow
@pytest.mark.gpu  # sizes that are cut into parts need a GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_every_feature_at_sizes_that_are_cut_into_parts(backend, poison, random, integers, device, dim, dtype):
    """Tiles in whole waves, tiles cut along their keys, empty parts, a tile with 64 rows or fewer: all at once."""
    q, k, v = qkv(random, device, 3, 700, 3000, 12, dim, 4, dtype=dtype)
    bias = random(3, 3000, device=device) * 2
    bias[:, ::5], bias[0, 400:1500] = -INF, math.log(4)
    lens = dict(
        q_lens=torch.tensor([700, 0, 65], dtype=torch.int32, device=device),
        kv_lens=torch.tensor([2999, 3000, 1], dtype=torch.int32, device=device),
    )
    index = dict(q_index=integers(-1, 700, (3, 900), device), kv_index=integers(-1, 3000, (3, 2500), device))
    check(q, k, v, key_bias=bias)
    check(q, k, v, key_bias=bias, **lens)
    check(q, k, v, key_bias=bias, **lens, q_index=index["q_index"])
    check(q, k, v, key_bias=bias, **lens, **index)
    check(q, k, v, **index)
    out_index = torch.stack([torch.randperm(1000, generator=torch.Generator().manual_seed(b)) for b in range(3)]).int()
    out_index = out_index[:, :900].to(device)
    out_index[:, ::5] = -1
    for options in (dict(key_bias=bias, **lens, q_index=index["q_index"]), dict(**lens, **index)):
        out = torch.full((3, 1000, 12, dim), float("nan"), dtype=dtype, device=device)
        lse = torch.ops.specedit.mixed_res_attn_scatter_(out, q, k, v, out_index, **options)
        rows, rows_lse = torch.ops.specedit.mixed_res_attn(q, k, v, **options)
        expected = scattered(torch.full_like(out, float("nan")), rows, out_index)
        assert torch.equal(lse, rows_lse)
        assert torch.equal(out.nan_to_num(7777), expected.nan_to_num(7777))


@pytest.mark.gpu  # graphs need a GPU
def test_one_graph_serves_many_lengths(backend, random, device):
    """Captured once, replayed with other lengths and biases: nothing of them is in the launch."""
    if backend == "reference":
        pytest.skip("the reference allocates as it goes")
    q, k, v = qkv(random, device, 1, 600, 2000, 4, 128, dtype=torch.bfloat16)
    bias = torch.zeros(1, 2000, device=device)
    q_lens, kv_lens = (torch.tensor([n], dtype=torch.int32, device=device) for n in (600, 2000))
    options = dict(key_bias=bias, q_lens=q_lens, kv_lens=kv_lens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.ops.specedit.mixed_res_attn(q, k, v, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out, lse = torch.ops.specedit.mixed_res_attn(q, k, v, **options)
    torch.cuda.current_stream().wait_stream(stream)
    for queries, keys in ((600, 2000), (129, 1), (0, 700), (64, 1999)):
        q_lens.fill_(queries)
        kv_lens.fill_(keys)
        bias.copy_(random(1, 2000))
        graph.replay()
        again, again_lse = torch.ops.specedit.mixed_res_attn(q, k, v, **options)
        assert torch.equal(out, again) and torch.equal(lse, again_lse)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(), ""),
        (dict(dtype=torch.float32), "bf16 and fp16, not fp32"),
        (dict(dim=96), "head dimensions 64 and 128, not 96"),
        (dict(scale=0.0), "a scale from 1e-6 to 1e6, not 0.0"),
        (dict(scale=-0.1), "a scale from 1e-6 to 1e6"),
        (dict(batch=513), "at most 512 batch entries"),
        (dict(q=torch.zeros(1, 9, 2, 68, dtype=torch.half)[..., 2:66]), "q: the kernel needs rows on a 16-byte grid"),
        (dict(k=torch.zeros(1, 9, 2, 68, dtype=torch.half)[..., :64]), "k: the kernel needs rows on a 16-byte grid"),
        (dict(v=torch.zeros(1, 1, 2, 64, dtype=torch.half).expand(1, 9, 2, 64)), "v: the kernel needs rows"),
        (dict(kv_index=torch.zeros(1, 18, dtype=torch.int32)[:, ::2]), "kv_index: the kernel needs a contiguous"),
    ],
)
def test_what_the_cuda_kernel_leaves_to_triton(change, words):
    from specedit_kernels.ops.mixed_res_attn import _csrc_refuses

    shape = (change.pop("batch", 1), 9, 2, change.pop("dim", 64))
    tensor = torch.zeros(shape, dtype=change.pop("dtype", torch.float16))
    call = (
        dict(
            q=tensor,
            k=tensor,
            v=tensor,
            key_bias=None,
            q_index=None,
            kv_index=None,
            q_lens=None,
            kv_lens=None,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            max_seqlen_q=None,
            max_seqlen_k=None,
            scale=0.1,
        )
        | change
    )
    reason = _csrc_refuses(**call)
    assert words in reason and bool(words) == bool(reason)


@pytest.mark.gpu  # more than 2^31 elements need a GPU
def test_offsets_past_32_bits(backend, device):
    """The last batch element's rows are more than 2^31 elements from the first."""
    if backend == "reference":
        pytest.skip("the reference has no offsets of its own")
    rows = (2**31) // (24 * 128) + 200
    k = torch.zeros(1, rows, 24, 128, dtype=torch.bfloat16, device=device)
    k[:, -50:] = torch.randn(1, 50, 24, 128, device=device)
    q = torch.randn(1, 9, 24, 128, dtype=torch.bfloat16, device=device)
    last = torch.arange(rows - 50, rows, dtype=torch.int32, device=device)[None]
    out, _ = torch.ops.specedit.mixed_res_attn(q, k, k, kv_index=last)
    small, _ = torch.ops.specedit.mixed_res_attn(q, k[:, -50:].contiguous(), k[:, -50:].contiguous())
    torch.testing.assert_close(out, small, rtol=2e-2, atol=2e-2)
    far, _ = torch.ops.specedit.mixed_res_attn(k, q, q, q_index=last)
    near, _ = torch.ops.specedit.mixed_res_attn(k[:, -50:].contiguous(), q, q)
    torch.testing.assert_close(far, near, rtol=2e-2, atol=2e-2)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(q=torch.zeros(4, 2, 64)), ValueError, r"q: expected \[B, S, H, D\] \(padded .*\), got \[4, 2, 64\]"),
        (dict(k=torch.zeros(1, 5, 2, 32)), ValueError, r"k: expected shape \[B=1, S, Hk, D=64\]"),
        (dict(k=torch.zeros(1, 5, 3, 64)), ValueError, "k: expected heads that divide q's 2, got 3"),
        (dict(v=torch.zeros(1, 6, 2, 64)), ValueError, r"v: expected k's shape \[1, 5, 2, 64\]"),
        (dict(v=torch.zeros(1, 5, 2, 64).half()), TypeError, "v: expected q's dtype"),
        (dict(q=torch.zeros(1, 4, 2, 64).double()), TypeError, "q: expected dtype"),
        (dict(q=torch.zeros(1, 4, 2, 40), k=torch.zeros(1, 5, 2, 40)), ValueError, "multiple of 16, 16 to 256, got 40"),
        (dict(q=torch.zeros(1, 4, 64, 2).transpose(2, 3)), ValueError, "q: expected a contiguous last dimension"),
        (dict(key_bias=torch.zeros(1, 4)), ValueError, r"key_bias: expected shape \[1, 5\], .*got \[1, 4\]"),
        (dict(key_bias=torch.zeros(1, 5).bfloat16()), TypeError, "key_bias: expected dtype float32"),
        (dict(q_index=torch.zeros(1, 4, dtype=torch.int64)), TypeError, "q_index: expected dtype int32"),
        (dict(q_index=i32(0, 1)), ValueError, r"q_index: expected shape \[B=1, slots\]"),
        (dict(q_index=i32(0, 4)[None]), ValueError, "q_index: expected values from -1 to 3"),
        (dict(kv_index=i32(-2, 4)[None]), ValueError, "kv_index: expected values from -1 to 4"),
        (dict(q_lens=i32(1, 2)), ValueError, r"q_lens: expected shape \[B=1\]"),
        (dict(kv_lens=torch.ones(1)), TypeError, "kv_lens: expected dtype int32"),
        (dict(max_seqlen_q=4), ValueError, "max_seqlen_q: expected None in the padded layout"),
        (dict(scale=float("nan")), ValueError, "scale: expected a finite number"),
        (dict(q=torch.zeros(1, 4, 2, 64, requires_grad=True)), ValueError, "q: expected a tensor that does not"),
    ],
)
def test_bad_input(change, error, words):
    call = dict(q=torch.zeros(1, 4, 2, 64), k=torch.zeros(1, 5, 2, 64), v=torch.zeros(1, 5, 2, 64)) | change
    with pytest.raises(error, match=words):
        torch.ops.specedit.mixed_res_attn(call.pop("q"), call.pop("k"), call.pop("v"), **call)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(cu_seqlens_k=None), ValueError, r"cu_seqlens_k: expected an int32 tensor \[B \+ 1\]"),
        (dict(max_seqlen_k=None), ValueError, r"max_seqlen_k: expected an integer >= 0 \(packed layout\), got None"),
        (dict(cu_seqlens_q=i32(0, 2, 3, 4)), ValueError, r"cu_seqlens_k: expected shape \[B \+ 1 = 4\]"),
        (dict(cu_seqlens_q=i32(0, 3, 2)), ValueError, "cu_seqlens_q: expected 0, then never decreasing"),
        (dict(cu_seqlens_k=i32(0, 2, 9)), ValueError, "cu_seqlens_k: expected 0, then never decreasing"),
        (dict(max_seqlen_q=1), ValueError, "cu_seqlens_q: expected 0, then never decreasing, steps of at most 1"),
        (dict(q_index=i32(0)[None]), ValueError, "q_index: expected None in the packed layout"),
        (dict(q=torch.zeros(1, 4, 2, 64)), ValueError, r"q: expected \[T, H, D\] \(packed"),
    ],
)
def test_bad_packed_input(change, error, words):
    call = (
        dict(
            q=torch.zeros(4, 2, 64),
            k=torch.zeros(5, 2, 64),
            v=torch.zeros(5, 2, 64),
            cu_seqlens_q=i32(0, 2, 4),
            cu_seqlens_k=i32(0, 2, 5),
            max_seqlen_q=2,
            max_seqlen_k=3,
        )
        | change
    )
    with pytest.raises(error, match=words):
        torch.ops.specedit.mixed_res_attn(call.pop("q"), call.pop("k"), call.pop("v"), **call)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(out=torch.zeros(1, 6, 2, 32)), ValueError, r"out: expected shape \[B=1, rows, H=2, D=64\]"),
        (dict(out=torch.zeros(1, 6, 2, 64).half()), TypeError, "out: expected q's dtype"),
        (dict(out_index=i32(0, 1)[None]), ValueError, r"out_index: expected shape \[B=1, Nq=4\]"),
        (dict(out_index=i32(0, 1, 2, 6)[None]), ValueError, "out_index: expected values from -1 to 5"),
    ],
)
def test_bad_scatter_leaves_out(change, error, words):
    call = (
        dict(
            out=torch.zeros(1, 6, 2, 64),
            q=torch.ones(1, 4, 2, 64),
            k=torch.ones(1, 5, 2, 64),
            v=torch.ones(1, 5, 2, 64),
            out_index=i32(0, 1, 2, 3)[None],
        )
        | change
    )
    with pytest.raises(error, match=words):
        torch.ops.specedit.mixed_res_attn_scatter_(*call.values())
    assert not call["out"].any()


def test_debug_finds_duplicate_destinations(monkeypatch):
    monkeypatch.setenv("SPECEDIT_DEBUG", "1")
    ones = torch.ones(1, 2, 2, 64)
    with pytest.raises(ValueError, match="out_index: expected each destination once"):
        torch.ops.specedit.mixed_res_attn_scatter_(torch.zeros(1, 3, 2, 64), ones, ones, ones, i32(1, 1)[None])
