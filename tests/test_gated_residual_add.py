# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from budget import assert_within_budget
from calls import distinct_rows, launches

from specedit_kernels.reference.gated_residual_add import gated_residual_add_ as reference

op = torch.ops.specedit.gated_residual_add_
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager(residual, x, gate, modulation_index, index):
    """residual + gate * x of each row of x [B, n, C], each step at the inputs' dtype."""
    tokens = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if index is None else index.clamp_min(0)
    tokens = tokens[:, : x.shape[1]].long()
    if modulation_index is None:
        gate = gate[:, None]
    else:
        rows = modulation_index.gather(1, tokens)
        at = rows.clamp_min(0).long()[..., None].expand(-1, -1, x.shape[2])
        gate = torch.where((rows >= 0)[..., None], gate.gather(1, at), 0)
    at = tokens[..., None].expand(-1, -1, x.shape[2])
    return (residual.gather(1, at) + gate * x).to(residual.dtype)


def check(residual, x, gate, modulation_index=None, index=None):
    before = residual.clone()
    exact = residual.double()
    slots = None if index is None else index[:, : x.shape[1]]
    reference(exact, x.double(), gate.double(), modulation_index, slots)
    fresh = eager(before, x, gate, modulation_index, index)
    assert op(residual, x, gate, modulation_index=modulation_index, index=index) is None
    if index is None:
        assert_within_budget(residual, exact, fresh)
        return
    b, i = torch.nonzero(slots >= 0, as_tuple=True)
    r = slots[b, i].long()
    if r.numel():
        assert_within_budget(residual[b, r], exact[b, r], fresh[b, i])
    untouched = torch.ones(residual.shape[:2], dtype=torch.bool, device=residual.device)
    untouched[b, r] = False
    assert torch.equal(residual[untouched], before[untouched])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 99, 127, 999])
def test_odd_lengths(backend, poison, random, device, rows, dtype):
    batch, channels = (1, 10) if rows == 999 else (2, 48)
    residual = random(batch, rows + 5, channels, dtype=dtype, device=device)
    x, gate = (random(*shape, dtype=dtype, device=device) for shape in ((batch, rows, channels), (batch, channels)))
    check(residual, x, gate, index=distinct_rows(batch, rows, rows + 5, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 64, 384, 1000, 3072, 9000])
def test_channels(backend, poison, random, device, channels, dtype):
    residual, x = (random(2, 3, channels, dtype=dtype, device=device) for _ in range(2))
    check(residual, x, random(2, channels, dtype=dtype, device=device))


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modulation_rows(backend, poison, random, integers, device, dtype, scattered):
    """Each token its own gate, by its place in the whole sequence; -1 adds nothing."""
    residual = random(2, 21, 40, dtype=dtype, device=device)
    x = random(2, 11 if scattered else 21, 40, dtype=dtype, device=device)
    of_token = integers(-1, 3, (2, 21), device)
    before = residual.clone()
    check(residual, x, random(2, 3, 40, dtype=dtype, device=device), of_token,
          distinct_rows(2, 13, 21, device) if scattered else None)  # fmt: skip
    assert torch.equal(residual[of_token < 0], before[of_token < 0])


def test_strides_and_dtypes_of_the_gate(backend, poison, random, integers, device):
    """Rows of a longer sequence, chunks of one projection, fp32 gates beside bf16 tokens."""
    base = random(3, 40, 60, dtype=torch.bfloat16, device=device)
    before = base.clone()
    view = base[1:, ::3, 5:55]
    x = random(9, 2, 50, dtype=torch.bfloat16, device=device).transpose(0, 1)
    gate = random(2, 6 * 50, device=device).chunk(6, dim=-1)[2]
    check(view, x, gate, index=distinct_rows(2, 9, 14, device))
    rows = random(4, 3 * 50, device=device).unflatten(0, (2, -1)).transpose(0, 1).chunk(3, dim=-1)[2]
    check(view, x, rows, integers(0, 2, (14, 2), device).T, distinct_rows(2, 18, 14, device)[:, ::2])
    view.copy_(before[1:, ::3, 5:55])
    assert torch.equal(base, before), "elements outside the view were written"


def test_scatter_is_a_part_of_all(backend, random, device):
    """Active rows get the bits that they would get among all; the same call gives the same bits."""
    residual, x = (random(2, 33, 96, dtype=torch.bfloat16, device=device) for _ in range(2))
    gate = random(2, 96, dtype=torch.bfloat16, device=device)
    whole, again, part = (residual.clone() for _ in range(3))
    op(whole, x, gate)
    op(again, x, gate)
    assert torch.equal(whole, again)
    index = distinct_rows(2, 20, 33, device)
    op(part, torch.ops.specedit.gather_tokens(x, index, 20), gate, index=index)
    for b in range(2):
        rows = index[b][index[b] >= 0].long()
        assert torch.equal(part[b, rows], whole[b, rows])


def test_empty(backend, random, device):
    residual, gate = random(2, 5, 16, device=device), random(2, 16, device=device)
    nowhere = torch.full((2, 4), -1, dtype=torch.int32, device=device)
    before = residual.clone()
    op(residual, random(2, 4, 16, device=device), gate, index=nowhere)
    op(residual, residual[:, :0].clone(), gate, index=nowhere)
    op(residual[:, :0], residual[:, :0].clone(), gate)
    op(residual[:, :0], random(2, 4, 16, device=device), gate, index=nowhere)
    op(residual[:0], residual[:0].clone(), gate[:0])
    assert torch.equal(residual, before)


def test_qwen_of_diffusers(backend, random, device):
    """The gate that QwenImageTransformerBlock picks for each token of zero_cond_t."""
    diffusers = pytest.importorskip("diffusers.models.transformers.transformer_qwenimage")
    residual, x = (random(2, 9, 32, device=device) for _ in range(2))
    projected = random(4, 3 * 32, device=device)
    modulate_index = torch.tensor([[0] * 5 + [1] * 4] * 2, device=device)
    picked = diffusers.QwenImageTransformerBlock._modulate(None, x, projected, modulate_index)[1]
    want = residual + picked * x
    gate = projected.unflatten(0, (2, -1)).transpose(0, 1).chunk(3, dim=-1)[2]
    op(residual, x, gate, modulation_index=modulate_index.int())
    torch.testing.assert_close(residual, want, rtol=1e-6, atol=1e-6)


def test_an_index_out_of_range_is_an_empty_slot(device):
    """The kernel itself touches nothing there; on CPU, and when debugging, the op refuses such an index before."""
    launch = pytest.importorskip("specedit_kernels.triton_kernels.gated_residual_add").gated_residual_add_
    whole = torch.zeros(4, 8, device=device)
    index, of_token = (
        torch.tensor([values], dtype=torch.int32, device=device) for values in ([1, -7, 0, 2, 2**31 - 1], [0, 5])
    )
    x, gate = torch.ones(1, 5, 8, device=device), torch.ones(1, 2, 8, device=device)
    launch(whole[None, 1:3], x, gate, of_token, index)
    assert not whole[[0, 2, 3]].any() and whole[1].eq(1).all()


def test_debug_finds_duplicates(backend, device, monkeypatch):
    monkeypatch.setenv("SPECEDIT_DEBUG", "1")
    residual = torch.zeros(2, 4, 8, device=device)
    index = torch.tensor([[0, 1, -1, -1], [2, 0, 2, -1]], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"index: expected each destination once, got \[2\] more than once in batch"):
        op(residual, torch.ones(2, 4, 8, device=device), torch.ones(2, 8, device=device), index=index)
    assert not residual.any()


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(residual=torch.zeros(5, 8)), ValueError, r"residual: expected shape \[B, N, C\]"),
        (dict(residual=torch.zeros(1, 8, 5).mT), ValueError, "residual: expected a contiguous last dimension"),
        (dict(x=torch.ones(1, 3, 7)), ValueError, r"x: expected shape \[1, n, 8\]"),
        (dict(index=None), ValueError, r"x: expected shape \[1, 5, 8\], since index is None"),
        (dict(x=torch.ones(1, 3, 8).half()), TypeError, "x: expected residual's dtype"),
        (dict(gate=torch.ones(1, 2, 8)), ValueError, r"gate: expected shape \[1, 8\], since modulation_index is None"),
        (dict(gate=torch.ones(1, 0, 8), modulation_index=torch.zeros(1, 5).int()), ValueError, "gate: expected at lea"),
        (dict(gate=torch.ones(1, 8).long()), TypeError, "gate: expected dtype bfloat16 or"),
        (dict(index=torch.zeros(1, 2).int()), ValueError, r"index: expected shape \[B=1, >= 3\]"),
        (dict(index=torch.zeros(1, 3).long()), TypeError, "index: expected dtype int32"),
        (dict(index=torch.tensor([[0, 1, 5]]).int()), ValueError, "index: expected values from -1 to 4"),
        (dict(gate=torch.ones(1, 2, 8), modulation_index=torch.full((1, 5), 2).int()), ValueError,
         "modulation_index: expected values from -1 to 1"),
        (dict(x=torch.ones(1, 3, 8, requires_grad=True)), ValueError, "x: expected a tensor that does not"),
    ],
)  # fmt: skip
def test_bad_input_leaves_the_residual(change, error, words):
    call = dict(residual=torch.zeros(1, 5, 8), x=torch.ones(1, 3, 8), gate=torch.ones(1, 8),
                index=torch.tensor([[0, 1, 2]]).int()) | change  # fmt: skip
    with pytest.raises(error, match=words):
        op(**call)
    assert not call["residual"].any()


@pytest.mark.gpu  # launches are a matter of GPUs
def test_one_launch(random, integers, device):
    residual, x = (random(1, 70, 3072, dtype=torch.bfloat16, device=device) for _ in range(2))
    gate = random(1, 2, 3072, dtype=torch.bfloat16, device=device)
    options = dict(modulation_index=integers(0, 2, (1, 70), device), index=distinct_rows(1, 70, 70, device))
    assert len(launches(lambda: op(residual, x, gate, **options))) == 1
