# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from budget import assert_within_budget
from calls import distinct_rows, launches
from combinations import pairwise

from specedit_kernels._panels import PANEL, in_panels, of_panels
from specedit_kernels.reference.qk_norm_rope_scatter import qk_norm_rope_scatter_ as reference

op = torch.ops.specedit.qk_norm_rope_scatter_
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tables(random, batch, rows, dim, device="cpu"):
    """cos and sin fp32 [batch, rows, dim / 2] of random angles."""
    angle = random(batch, rows, dim // 2, device=device) * 3
    return angle.cos(), angle.sin()


def eager(x, weight, cos, sin, split, eps):
    """The same formula with each step at x's dtype."""
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is not None and weight.dim() == 2:
        weight = torch.cat([weight[:1].expand(split, -1), weight[1:].expand(x.shape[1] - split, -1)])[:, None]
    if weight is not None:
        x = x * weight.to(x.dtype)
    cos, sin = cos.to(x.dtype)[:, :, None], sin.to(x.dtype)[:, :, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


def check(q, k, v, cos, sin, q_out=None, k_out=None, v_out=None, *, q_weight=None, k_weight=None, split=None,
          q_out_index=None, kv_out_index=None, eps=1e-6):  # fmt: skip
    """Written rows against float64 within the error budget, v's and all other rows bit for bit."""
    batch, rows = q.shape[:2]
    q_out = torch.full_like(q, float("nan")) if q_out is None else q_out
    k_out = torch.full_like(k, float("nan")) if k_out is None else k_out
    v_out = torch.full_like(v, float("nan")) if v_out is None else v_out
    before = [x.clone() for x in (q_out, k_out, v_out)]
    inputs = [x.clone() for x in (q, k, v)]
    exact = [x.double() for x in (*before, q, k, v, cos, sin)]
    weights = [None if w is None else w.double() for w in (q_weight, k_weight)]
    reference(*exact, *weights, split or 0, q_out_index, kv_out_index, eps)
    assert op(q_out, k_out, v_out, q, k, v, cos, sin, q_weight=q_weight, k_weight=k_weight, split=split,
              q_out_index=q_out_index, kv_out_index=kv_out_index, eps=eps) is None  # fmt: skip

    for out, index, old, oracle, fresh in (
        (q_out, q_out_index, before[0], exact[0], eager(q, q_weight, cos, sin, split, eps)),
        (k_out, kv_out_index, before[1], exact[1], eager(k, k_weight, cos, sin, split, eps)),
        (v_out, kv_out_index, before[2], None, v),
    ):
        if index is None:
            index = torch.arange(rows, dtype=torch.int32, device=q.device).expand(batch, rows)
        b, i = torch.nonzero(index[:, :rows] >= 0, as_tuple=True)
        r = index[b, i].long()
        if oracle is None:
            assert torch.equal(out[b, r], v[b, i])
        elif r.numel():
            assert_within_budget(out[b, r], oracle[b, r], fresh[b, i])
        untouched = torch.ones(out.shape[:2], dtype=torch.bool, device=out.device)
        untouched[b, r] = False
        words = torch.int32 if out.dtype == torch.float32 else torch.int16  # NaN equals NaN as a word
        assert torch.equal(out[untouched].view(words), old[untouched].view(words))
    for x, old in zip((q, k, v), inputs):
        assert torch.equal(x, old), "an input was written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 99, 127, 999])
def test_odd_lengths(backend, poison, random, device, rows, dtype):
    batch = 1 if rows == 999 else 2
    q, k, v = (random(batch, rows, 2, 8, dtype=dtype, device=device) for _ in range(3))
    k_out, v_out = (random(batch, rows + 3, 2, 8, dtype=dtype, device=device) for _ in range(2))
    check(q, k, v, *tables(random, 1, rows, 8, device), None, k_out, v_out,
          q_weight=random(8, dtype=dtype, device=device), k_weight=random(8, dtype=dtype, device=device),
          kv_out_index=distinct_rows(batch, rows, rows + 3, device))  # fmt: skip


# The two models' heads; grouped heads whose slices are full, have a rest, are empty; sizes that are no power of two.
HEADS = [(24, 24, 128, torch.float32), (24, 24, 128, torch.bfloat16), (24, 24, 128, torch.float16),
         (24, 8, 128, torch.bfloat16), (20, 5, 128, torch.float16), (5, 1, 64, torch.bfloat16),
         (12, 12, 64, torch.float32), (3, 3, 48, torch.bfloat16), (6, 2, 256, torch.float16),
         (1, 1, 2, torch.float32), (2, 2, 6, torch.bfloat16)]  # fmt: skip


@pytest.mark.parametrize("heads, kv_heads, dim, dtype", HEADS, ids=lambda x: str(x))
def test_heads(backend, poison, random, device, heads, kv_heads, dim, dtype):
    rows = 3
    q = random(2, rows, heads, dim, dtype=dtype, device=device)
    k, v = (random(2, rows, kv_heads, dim, dtype=dtype, device=device) for _ in range(2))
    k_out, v_out = (random(2, 9, kv_heads, dim, dtype=dtype, device=device) for _ in range(2))
    q_out = random(2, 7, heads, dim, dtype=dtype, device=device)
    check(q, k, v, *tables(random, 2, rows, dim, device), q_out, k_out, v_out,
          q_weight=random(dim, dtype=dtype, device=device), k_weight=random(dim, device=device),
          q_out_index=distinct_rows(2, rows, 7, device), kv_out_index=distinct_rows(2, rows, 9, device))  # fmt: skip


@pytest.mark.parametrize("which", ["neither", "q", "k"])
def test_weights_are_optional(backend, poison, random, device, which):
    q, k, v = (random(1, 11, 3, 32, device=device) for _ in range(3))
    weights = {f"{which}_weight": random(32, device=device)} if which != "neither" else {}
    check(q, k, v, *tables(random, 1, 11, 32, device), **weights)


@pytest.mark.parametrize("split", [0, 4, 11])
def test_two_sets_of_weights_are_two_calls(backend, poison, random, device, split):
    """Both ways to serve a double block write the same bits: two sets and one launch, or one call a stream."""
    q, k, v = (random(2, 11, 3, 32, dtype=torch.bfloat16, device=device) for _ in range(3))
    q_weight, k_weight = (random(2, 32, dtype=torch.bfloat16, device=device) for _ in range(2))
    cos, sin = tables(random, 1, 11, 32, device)
    index = distinct_rows(2, 11, 20, device)
    outs = [[torch.zeros(2, n, 3, 32, dtype=torch.bfloat16, device=device) for n in (11, 20, 20)] for _ in range(2)]
    op(*outs[0], q, k, v, cos, sin, q_weight=q_weight, k_weight=k_weight, split=split, kv_out_index=index)
    for stream, part in enumerate((slice(None, split), slice(split, None))):
        op(outs[1][0][:, part], *outs[1][1:], *(x[:, part] for x in (q, k, v, cos, sin)),
           q_weight=q_weight[stream], k_weight=k_weight[stream], kv_out_index=index[:, part])  # fmt: skip
    for one, two in zip(*outs):
        assert torch.equal(one, two)
    check(q, k, v, cos, sin, *outs[0], q_weight=q_weight, k_weight=k_weight[0], split=split, kv_out_index=index)


def test_strides(backend, poison, random, device):
    """Views of one projection, of longer buffers and of tables in diffusers' two forms are read without a copy."""
    joint = random(2, 9, 8 * 16, dtype=torch.bfloat16, device=device)
    q, k, v = (x.unflatten(-1, (-1, 16)) for x in joint.split((64, 32, 32), dim=-1))
    buffers = random(2, 30, 2, 2, 20, dtype=torch.bfloat16, device=device)
    before = buffers.clone()
    k_out, v_out = (buffers[:, ::2, i, :, 2:18] for i in range(2))
    angle = random(9, 16, device=device)
    q_out = random(4, 2, 9, 16, dtype=torch.bfloat16, device=device).permute(1, 2, 0, 3)
    check(q, k, v, angle.cos()[None, :, ::2], torch.polar(torch.ones_like(angle), angle).imag[None, :, ::2],
          q_out, k_out, v_out, q_weight=random(3, 40, device=device)[1, 5:21],
          kv_out_index=distinct_rows(2, 12, 15, device)[:, :9])  # fmt: skip
    k_out.copy_(before[:, ::2, 0, :, 2:18])
    v_out.copy_(before[:, ::2, 1, :, 2:18])
    assert torch.equal(buffers, before), "elements outside the views were written"


def test_table_of_each_sample_and_of_all(backend, random, device):
    q, k, v = (random(2, 6, 2, 16, device=device) for _ in range(3))
    cos, sin = tables(random, 1, 6, 16, device)
    outs = [[torch.empty_like(q) for _ in range(3)] for _ in range(2)]
    op(*outs[0], q, k, v, cos, sin)
    op(*outs[1], q, k, v, cos.repeat(2, 1, 1), sin.expand(2, -1, -1))
    for one, each in zip(*outs):
        assert torch.equal(one, each)


def test_deterministic(backend, random, device):
    q, k, v = (random(2, 33, 4, 32, dtype=torch.bfloat16, device=device) for _ in range(3))
    cos, sin = tables(random, 1, 33, 32, device)
    outs = [[torch.zeros_like(q) for _ in range(3)] for _ in range(2)]
    for out in outs:
        op(*out, q, k, v, cos, sin, q_weight=random(32, device=device) * 0 + 2)
    for a, b in zip(*outs):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_rounding(backend, random, device, dtype):
    """Every element is the exact one, rounded once: half a step of its own, and fp32's error of its row."""
    q, k, v = (random(1, 40, 2, 64, dtype=dtype, device=device) for _ in range(3))
    weight = random(64, dtype=dtype, device=device)
    cos, sin = tables(random, 1, 40, 64, device)
    outs = [torch.empty_like(q) for _ in range(3)]
    op(*outs, q, k, v, cos, sin, q_weight=weight, k_weight=weight)
    exact = [torch.empty_like(q).double() for _ in range(3)]
    reference(*exact, *(x.double() for x in (q, k, v, cos, sin, weight, weight)), 0, None, None, 1e-6)
    # Triton's interpreter cuts bf16 off instead of rounding: a whole step.
    steps = 1.0 if backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16 else 0.5
    for out, oracle in zip(outs, exact):
        assert ((out.double() - oracle).abs() <= steps * torch.finfo(dtype).eps * oracle.abs() + 5e-6).all()


@pytest.mark.parametrize("value", [0.0, 1e-4, 3e4])
def test_magnitudes(backend, poison, random, device, value):
    """Zeros stay zeros; squares that fp16 could not hold do no harm."""
    q, k, v = (random(1, 5, 2, 64, dtype=torch.float16, device=device).sign() * value for _ in range(3))
    cos, sin = tables(random, 1, 5, 64, device)
    outs = [torch.full_like(q, float("nan")) for _ in range(3)]
    op(*outs, q, k, v, cos, sin)
    exact = [torch.zeros_like(q).double() for _ in range(3)]
    reference(*exact, q.double(), k.double(), v.double(), cos.double(), sin.double(), None, None, 0, None, None, 1e-6)
    for out, want in zip(outs, exact):
        torch.testing.assert_close(out.double(), want, rtol=1e-3, atol=1e-6)


def test_all_empty_and_no_rows(backend, random, device):
    q, k, v = (random(2, 5, 2, 16, device=device) for _ in range(3))
    nowhere = torch.full((2, 5), -1, dtype=torch.int32, device=device)
    check(q, k, v, *tables(random, 1, 5, 16, device), q_out_index=nowhere, kv_out_index=nowhere)
    check(q[:, :0], k[:, :0], v[:, :0], *tables(random, 1, 0, 16, device), q, k, v)
    check(q[:0], k[:0], v[:0], *tables(random, 1, 5, 16, device), kv_out_index=nowhere[:0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flux_of_diffusers(backend, random, device, dtype):
    """The rows of FLUX's own processor: torch's RMSNorm, then its interleaved real tables."""
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    ids = torch.zeros(13, 3)  # 4 text tokens stand at zero
    ids[4:, 1], ids[4:, 2] = torch.arange(9) // 3 + 0.5, torch.arange(9) % 3
    cos, sin = (x.to(device) for x in FluxPosEmbed(10000, [8, 12, 12])(ids))
    q, k, v = (random(2, 13, 3, 32, dtype=dtype, device=device) for _ in range(3))
    norm = torch.nn.RMSNorm(32, eps=1e-6).to(device, dtype)
    norm.weight.data = random(32, dtype=dtype, device=device)

    def theirs(x):
        return apply_rotary_emb(norm(x), (cos, sin), sequence_dim=1)

    same_as_theirs(backend, q, k, v, cos[None, :, ::2], sin[None, :, ::2], norm.weight.detach(), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qwen_of_diffusers(backend, random, device, dtype):
    """The rows of Qwen's own processor: diffusers' RMSNorm, then its complex tables."""
    pytest.importorskip("diffusers")
    from diffusers.models.normalization import RMSNorm
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope, apply_rotary_emb_qwen

    rope = QwenEmbedRope(10000, [8, 12, 12], scale_rope=True)
    image, text = rope([[(1, 3, 3)]], device=torch.device("cpu"), max_txt_seq_len=4)
    freqs = torch.cat([text, image]).to(device)
    q, k, v = (random(2, 13, 3, 32, dtype=dtype, device=device) for _ in range(3))
    norm = RMSNorm(32, eps=1e-6).to(device, dtype)
    norm.weight.data = random(32, dtype=dtype, device=device)

    def theirs(x):
        return apply_rotary_emb_qwen(norm(x), freqs, use_real=False)

    same_as_theirs(backend, q, k, v, freqs.real[None], freqs.imag[None], norm.weight.detach(), theirs)


def same_as_theirs(backend, q, k, v, cos, sin, weight, theirs):
    """Our rows are theirs: to fp32 rounding in fp32, not further from float64 than theirs in 16 bits."""
    outs = [torch.full_like(q, float("nan")) for _ in range(3)]
    with torch.no_grad():
        op(*outs, q, k, v, cos, sin, q_weight=weight, k_weight=weight)
        exact = [torch.zeros_like(q).double() for _ in range(3)]
        reference(*exact, q.double(), k.double(), v.double(), cos.double(), sin.double(), weight.double(),
                  weight.double(), 0, None, None, 1e-6)  # fmt: skip
        for out, oracle, x in ((outs[0], exact[0], q), (outs[1], exact[1], k)):
            if q.dtype == torch.float32:
                torch.testing.assert_close(out, theirs(x), rtol=1e-5, atol=3e-6)
            assert_within_budget(out, oracle, theirs(x))
            # Not in Triton's interpreter, which cuts bf16 off instead of rounding.
            if q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and (q.is_cuda or backend == "reference")):
                ours, other = ((y.double() - oracle).square().mean() for y in (out, theirs(x)))
                assert ours <= other
    assert torch.equal(outs[2], v)


def test_both_table_forms_are_one(device):
    """FLUX's repeated real table and a complex one of the same angles give the same bits."""
    generator = torch.Generator().manual_seed(5)
    freqs = torch.polar(torch.ones(7, 8), torch.randn(7, 8, generator=generator))
    q = torch.randn(1, 7, 2, 16, generator=generator).to(device)
    cos, sin = (x.repeat_interleave(2, dim=-1).to(device) for x in (freqs.real, freqs.imag))
    freqs = freqs.to(device)
    outs = [[torch.empty_like(q) for _ in range(3)] for _ in range(2)]
    op(*outs[0], q, q, q, cos[None, :, ::2], sin[None, :, ::2])
    op(*outs[1], q, q, q, freqs.real[None], freqs.imag[None])
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])


def test_views_of_joint_buffers_compile(random):
    """Two streams written into views of the same buffers, under torch.compile without a graph break."""
    q_out, k_out, v_out = (torch.zeros(1, 12, 2, 16) for _ in range(3))
    q, k, v = (random(1, 8, 2, 16) for _ in range(3))
    cos, sin = tables(random, 1, 8, 16)

    def step(q_out, k_out, v_out):
        for part, weight in ((slice(0, 3), torch.ones(16)), (slice(3, 8), torch.full((16,), 2.0))):
            op(q_out[:, part], k_out[:, part], v_out[:, part], *(x[:, part] for x in (q, k, v, cos, sin)),
               q_weight=weight, k_weight=weight)  # fmt: skip
        return q_out + 1

    torch._dynamo.reset()
    plain = [x.clone() for x in (q_out, k_out, v_out)]
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(q_out, k_out, v_out), step(*plain))
    for got, want in zip((q_out, k_out, v_out), plain):
        assert torch.equal(got, want) and want[:, :8].any() and not want[:, 8:].any()


def test_an_index_out_of_range_is_an_empty_slot(device):
    """The kernel itself touches nothing there; on CPU, and when debugging, the op refuses such an index before."""
    launch = pytest.importorskip("specedit_kernels.triton_kernels.qk_norm_rope_scatter").qk_norm_rope_scatter_
    q = torch.ones(1, 4, 2, 8, device=device)
    cos = torch.ones(1, 4, 4, device=device)
    outs = [torch.zeros(3, 2, 8, device=device) for _ in range(3)]  # one row before and one after the one given
    index = torch.tensor([[1, -7, 0, 2**31 - 1]], dtype=torch.int32, device=device)
    launch(*(x[None, 1:2] for x in outs), q, q, q, cos, cos * 0, None, None, 0, index, index, 0.0)
    for out in outs:
        assert torch.equal(out[1], q[0, 0]) and not out[::2].any()


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 12 << 30, reason="needs a GPU with 12 GB free"
)
def test_offsets_beyond_32_bits(device):
    rows = 2**31 // (2 * 24 * 128) + 10
    buffers = torch.zeros(1, rows, 2, 24, 128, dtype=torch.bfloat16, device=device)
    q, k, v = (torch.randn(1, 3, 24, 128, dtype=torch.bfloat16, device=device) for _ in range(3))
    cos = torch.ones(1, 3, 64, device=device)
    index = torch.tensor([[rows - 1, -1, 0]], dtype=torch.int32, device=device)
    outs = [torch.zeros_like(q) for _ in range(3)]
    op(*outs, q, k, v, cos, cos * 0)
    op(torch.empty_like(q), buffers[:, :, 0], buffers[:, :, 1], q, k, v, cos, cos * 0, kv_out_index=index)
    for i, want in ((0, outs[1]), (1, outs[2])):
        assert torch.equal(buffers[0, [rows - 1, 0], i], want[0, [0, 2]])
    buffers[0, [rows - 1, 0]] = 0
    assert not buffers.any()


def test_debug_finds_duplicates(backend, device, monkeypatch):
    monkeypatch.setenv("SPECEDIT_DEBUG", "1")
    q = torch.ones(1, 3, 2, 8, device=device)
    outs = [torch.zeros(1, 5, 2, 8, device=device) for _ in range(3)]
    cos = torch.ones(1, 3, 4, device=device)
    index = torch.tensor([[4, 0, 4, 4]], dtype=torch.int32, device=device)
    for name in ("q_out_index", "kv_out_index"):
        with pytest.raises(ValueError, match=rf"{name}: expected each destination once, got \[4\] more than once"):
            op(*outs, q, q, q, cos, cos, **{name: index})
    assert not any(out.any() for out in outs)


ONES = torch.ones(1, 3, 4, 8)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(q=ONES.int()), TypeError, "q: expected dtype bfloat16 or"),
        (dict(q=ONES[0]), ValueError, r"q: expected shape \[B, N, H, D\]"),
        (dict(q=torch.ones(1, 3, 4, 7)), ValueError, "q: expected an even last dimension"),
        (dict(k=torch.ones(1, 2, 2, 8)), ValueError, r"k: expected shape \[1, 3, Hk, 8\]"),
        (dict(k=torch.ones(1, 3, 3, 8)), ValueError, "k: expected a number of heads that divides q's 4"),
        (dict(v=torch.ones(1, 3, 1, 8)), ValueError, r"v: expected shape \[1, 3, 2, 8\] \(k's\)"),
        (dict(v=torch.ones(1, 3, 2, 8).half()), TypeError, "v: expected q's dtype"),
        (dict(q_out=torch.zeros(1, 2, 4, 8)), ValueError, "q_out: expected >= 3 rows, since q_out_index is None"),
        (dict(k_out=torch.zeros(1, 5, 4, 8)), ValueError, r"k_out: expected shape \[1, rows, 2, 8\]"),
        (dict(v_out=torch.zeros(1, 4, 2, 8)), ValueError, r"v_out: expected shape \[1, 5, 2, 8\] \(k_out's\)"),
        (dict(k_out=torch.zeros(1, 5, 8, 2).mT), ValueError, "k_out: expected a contiguous last dimension"),
        (dict(cos=torch.ones(1, 3, 8)), ValueError, r"cos: expected shape \[B or 1, 3, 4\]"),
        (dict(sin=torch.ones(2, 3, 4)), ValueError, r"sin: expected shape \[1 or 1, 3, 4\]"),
        (dict(sin=torch.ones(1, 3, 4).half()), TypeError, "sin: expected dtype float32"),
        (dict(q_weight=torch.ones(4)), ValueError, r"q_weight: expected shape \[8\] or \[2, 8\]"),
        (dict(k_weight=torch.ones(2, 8)), ValueError, "split: expected a row from 0 to 3, since a weight has two sets"),
        (dict(k_weight=torch.ones(2, 8), split=4), ValueError, "split: expected a row from 0 to 3, got 4"),
        (dict(split=1), ValueError, r"split: expected None, since no weight has shape \[2, 8\], got 1"),
        (dict(kv_out_index=torch.zeros(1, 2).int()), ValueError, r"kv_out_index: expected shape \[B=1, >= 3\]"),
        (dict(kv_out_index=torch.zeros(1, 3).long()), TypeError, "kv_out_index: expected dtype int32"),
        (dict(q_out_index=torch.tensor([[0, 1, 3]]).int()), ValueError, "q_out_index: expected values from -1 to 2"),
        (dict(v=torch.ones(1, 3, 2, 8, requires_grad=True)), ValueError, "v: expected a tensor that does not require"),
    ],
)
def test_bad_input_leaves_the_outputs(change, error, words):
    call = dict(
        q_out=torch.zeros(1, 3, 4, 8), k_out=torch.zeros(1, 5, 2, 8), v_out=torch.zeros(1, 5, 2, 8), q=ONES,
        k=torch.ones(1, 3, 2, 8), v=torch.ones(1, 3, 2, 8), cos=torch.ones(1, 3, 4), sin=torch.ones(1, 3, 4),
    ) | change  # fmt: skip
    with pytest.raises(error, match=words):
        op(**call)
    assert not any(call[name].any() for name in ("q_out", "k_out", "v_out"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_keys_and_values_alone(backend, poison, random, device, kv_heads, dtype):
    """A call without query heads writes k and v."""
    q, k, v = (random(2, 7, heads, 16, dtype=dtype, device=device) for heads in (0, kv_heads, kv_heads))
    weight, index = random(16, device=device), distinct_rows(2, 7, 9, device)
    outs = [random(2, 9, heads, 16, dtype=dtype, device=device) for heads in (0, kv_heads, kv_heads)]
    check(q, k, v, *tables(random, 1, 7, 16, device), *outs, k_weight=weight, kv_out_index=index)


@pytest.mark.gpu  # launches are a matter of GPUs
def test_one_launch(random, device):
    q, k, v = (random(1, 70, 24, 128, dtype=torch.bfloat16, device=device) for _ in range(3))
    outs = [torch.empty_like(q) for _ in range(3)]
    call = (*outs, q, k, v, *tables(random, 1, 70, 128, device))
    weight, index = torch.ones(128, device=device), distinct_rows(1, 70, 70, device)

    def run():
        op(*call, q_weight=weight, k_weight=weight, q_out_index=index, kv_out_index=index)

    assert len(launches(run)) == 1


op_fp8 = torch.ops.specedit.qk_norm_rope_scatter_fp8_
E4M3 = torch.float8_e4m3fn


def check_fp8(random, device, batch, rows, heads, kv_heads, dim, dtype, apart, out_rows, **options):
    """Written numbers within half a place of float64's, others bit for bit. apart: bytes between channels of panels."""
    q = random(batch, rows, heads, dim, dtype=dtype, device=device)
    k, v = (random(batch, rows, kv_heads, dim, dtype=dtype, device=device) for _ in range(2))
    scales = [0.01 + 0.02 * random(batch, 1, n, device=device).abs() for n in (heads, kv_heads, kv_heads)]
    outs = [torch.randint(0, 120, (batch, out_rows, n, dim), dtype=torch.uint8).to(device).view(E4M3)
            for n in (heads, kv_heads, kv_heads)]  # fmt: skip
    v_out = in_panels(outs[2])
    v_out.view(torch.uint8)[:, -1, ..., out_rows - PANEL * (v_out.shape[1] - 1) :] = 0x7F
    if apart:  # [B, Hk, panels, D, PANEL] in memory, with room between channels
        room = torch.zeros(batch, kv_heads, v_out.shape[1], dim, PANEL + apart, dtype=torch.uint8, device=device)
        v_out = room[..., :PANEL].transpose(1, 2).copy_(v_out.view(torch.uint8)).view(E4M3)
    before = [x.clone() for x in outs]
    beyond = v_out.view(torch.uint8)[:, -1, ..., out_rows % PANEL or PANEL :].clone()
    cos, sin = tables(random, 1, rows, dim, device)
    exact = [x.double() for x in before]
    doubles = {n: x.double() if "weight" in n else x for n, x in options.items()}
    reference(
        *exact, *(x.double() for x in (q, k, v, cos, sin)), doubles.get("q_weight"), doubles.get("k_weight"),
        options.get("split") or 0, options.get("q_out_index"), options.get("kv_out_index"), 1e-6,
    )  # fmt: skip
    op_fp8(*outs[:2], v_out, q, k, v, *scales, cos, sin, **options)
    outs[2] = of_panels(v_out, out_rows)
    assert torch.equal(v_out.view(torch.uint8)[:, -1, ..., out_rows % PANEL or PANEL :], beyond)
    names = ("q_out_index", "kv_out_index", "kv_out_index")
    for out, old, oracle, scale, name in zip(outs, before, exact, scales, names):
        index = options.get(name)
        if index is None:
            index = torch.arange(rows, dtype=torch.int32, device=device).expand(batch, rows)
        b, i = torch.nonzero(index[:, :rows] >= 0, as_tuple=True)
        r = index[b, i].long()
        want = (oracle / scale.double()[..., None])[b, r].clamp(-448, 448)
        error = (out[b, r].double() - want).abs()
        assert (error <= 1.001 * torch.maximum(want.abs() / 17, torch.full_like(want, 2.0**-10)) + 1e-6).all()
        untouched = torch.ones(out.shape[:2], dtype=torch.bool, device=device)
        untouched[b, r] = False
        assert torch.equal(out.view(torch.uint8)[untouched], old.view(torch.uint8)[untouched])


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, dtype, apart",
    pairwise([(1, 2, 2, 8), (37, 3, 3, 128), (70, 4, 2, 16), (5, 6, 2, 48)], DTYPES, [0, 16]),
    ids=str,
)
def test_in_e4m3(backend, poison, random, device, shape, dtype, apart):
    rows, heads, kv_heads, dim = shape
    weights = [random(dim, dtype=dtype, device=device) for _ in range(2)]
    given = dict(q_weight=weights[0], k_weight=weights[1])
    check_fp8(random, device, 2, rows, heads, kv_heads, dim, dtype, apart, rows + 3, **given)
    index = distinct_rows(2, rows, rows + 3, device)
    check_fp8(random, device, 2, rows, heads, kv_heads, dim, dtype, apart, rows + 3, **given, kv_out_index=index)
    two = random(2, dim, dtype=dtype, device=device)
    given = dict(q_weight=two, split=rows // 2, q_out_index=index, kv_out_index=index)
    check_fp8(random, device, 2, rows, heads, kv_heads, dim, dtype, apart, rows + 3, **given)


@pytest.mark.parametrize("apart", [0, 3], ids=["words", "bytes"])
def test_in_e4m3_rows_in_order_and_not(backend, random, device, apart):
    """32 tokens that go to rows one after another are written in vectors of keys where memory is aligned, others by the
    byte: those that start inside of a vector, have a hole, or are not in order."""
    order = torch.arange(70, dtype=torch.int32, device=device)
    other = order + 64
    other[5], other[[40, 41]] = -1, other[[41, 40]]
    for index in (order + 4, other) if apart == 0 else (other,):
        check_fp8(random, device, 1, 70, 1, 1, 4, torch.bfloat16, apart, 134, kv_out_index=index[None])


def test_in_e4m3_panels_far_apart(backend, random, device):
    """Their stride does not fit into 32 bits. Memory that is not touched takes none on a CPU."""
    q, k, v = (random(1, 5, 2, 16, device=device) for _ in range(3))
    scale, (cos, sin) = torch.full((1, 1, 2), 0.01, device=device), tables(random, 1, 5, 16, device)
    index = torch.tensor([[70, 0, -1, 99, 64]], dtype=torch.int32, device=device)
    near = torch.zeros(1, 2, 2, 16, PANEL, dtype=torch.uint8, device=device)
    room = torch.empty(2**31 + near.numel(), dtype=torch.uint8, device=device)
    far = room.as_strided(near.shape, (2**31, 2**31, 16 * PANEL, PANEL, 1)).zero_()
    for v_out in (near, far):
        outs = [torch.zeros(1, n, 2, 16, device=device).to(E4M3) for n in (5, 100)]
        op_fp8(*outs, v_out.view(E4M3), q, k, v, scale, scale, scale, cos, sin, kv_out_index=index)
    assert near.any(-1).any(-1).all() and torch.equal(near, far)


def test_in_e4m3_what_is_beyond_its_range(backend, random, device):
    """448 times the scale at most, and a scale of a 448th of sqrt(D) max |weight| cuts nothing off."""
    weight, inf = random(32, device=device) + 2, float("inf")
    q = torch.zeros(1, 3, 1, 32, device=device)
    q[0, :, 0, 5] = 1.0  # all of a row in one component
    v = torch.full_like(q, -1e6)
    v[0, 1], v[0, 2] = inf, float("nan")
    outs = [torch.zeros(1, 3, 1, 32, device=device).to(E4M3) for _ in range(3)]
    outs[2] = in_panels(outs[2])
    bound = (32**0.5 * weight.abs().max() / 448).reshape(1, 1, 1)
    one, zero = torch.ones(1, 3, 16, device=device), torch.zeros(1, 3, 16, device=device)
    op_fp8(*outs, q, q, v, bound, bound / 4, bound, one, zero, q_weight=weight, k_weight=weight)
    outs[2] = of_panels(outs[2], 3)
    want = 32**0.5 * weight[5] / bound.item()
    assert (outs[0][0, :, 0, 5].float() - want).abs().max() <= want / 16 and want < 448
    assert (outs[1][0, :, 0, 5].float() == (4 * want).clamp(max=448).to(E4M3).float()).all()
    assert (outs[2][0, 0].float() == -448).all() and (outs[2][0, 1].float() == 448).all()
    assert outs[2][0, 2].float().isnan().all()


def test_bad_input_in_e4m3():
    x, out = torch.ones(1, 3, 2, 8), torch.ones(1, 3, 2, 8).to(E4M3)
    table, scale = torch.ones(1, 3, 4), torch.ones(1, 1, 2)
    panels, apart = in_panels(out), torch.zeros(1, 1, 2, 8, 128).to(E4M3)[..., ::2]
    for error, words, outs, scales in (
        (TypeError, "q_out: expected .*float8_e4m3fn, got torch.float32", (x, out, panels), (scale,) * 3),
        (ValueError, "v_out: expected a contiguous last dim", (out, out, apart), (scale,) * 3),
        (ValueError, r"v_out: expected shape \[1, 1, 2, 8, 64\], panels for k_out's 3 rows", (out,) * 3, (scale,) * 3),
        (
            ValueError,
            r"k_scale: expected shape \[1, 1, 2\], one a head",
            (out, out, panels),
            (scale, scale[..., :1], scale),
        ),
        (TypeError, "v_scale: expected dtype float32", (out, out, panels), (scale, scale, scale.double())),
    ):
        with pytest.raises(error, match="qk_norm_rope_scatter_fp8_: " + words):
            op_fp8(*outs, x, x, x, *scales, table, table)
