# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from budget import assert_within_budget
from calls import launches

from specedit_kernels.reference.adaln_modulate import adaln_modulate as reference

op = torch.ops.specedit.adaln_modulate
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager(x, scale, shift, modulation_index, index, eps):
    """What diffusers computes, each step at the inputs' dtype, then the rows."""
    y = torch.nn.functional.layer_norm(x, (x.shape[-1],), eps=eps)
    if modulation_index is None:
        scale, shift = scale[:, None], shift[:, None]
    else:
        known = (modulation_index >= 0)[..., None]
        at = modulation_index.clamp_min(0).long()[..., None].expand(-1, -1, x.shape[2])
        scale, shift = (torch.where(known, v.gather(1, at), 0) for v in (scale, shift))
    y = (y * (1 + scale) + shift).to(x.dtype)
    if index is None:
        return y
    at = index.clamp_min(0).long()[..., None].expand(-1, -1, x.shape[2])
    return torch.where((index >= 0)[..., None], y.gather(1, at), 0)


def check(x, scale, shift, modulation_index=None, index=None, eps=1e-6, luck=1.0):
    y = op(x, scale, shift, modulation_index=modulation_index, index=index, eps=eps)
    assert y.is_contiguous()
    oracle = reference(x.double(), scale.double(), shift.double(), modulation_index, index, eps)
    assert_within_budget(y, oracle, eager(x, scale, shift, modulation_index, index, eps), luck=luck)
    if index is not None:
        assert not y[index < 0].any()
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 7, 99, 127, 999])
def test_odd_lengths(backend, poison, random, integers, device, rows, dtype):
    batch, channels = (1, 10) if rows == 999 else (2, 48)
    x = random(batch, rows, channels, dtype=dtype, device=device) * 3 + 1
    scale, shift = (random(batch, channels, dtype=dtype, device=device) for _ in range(2))
    check(x, scale, shift, index=integers(-1, rows, (batch, rows + 2), device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 64, 384, 1000, 3072])
def test_channels(backend, poison, random, device, channels, dtype):
    x = random(2, 3, channels, dtype=dtype, device=device)
    check(x, *(random(2, channels, dtype=dtype, device=device) for _ in range(2)))


@pytest.mark.parametrize("channels", [9000, 20000])
def test_many_channels(backend, poison, random, device, channels):
    """More than one pass of 4 warps: 16 of them, in chunks."""
    x = random(1, 2, channels, dtype=torch.bfloat16, device=device)
    check(x, *(random(1, channels, device=device) for _ in range(2)))


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modulation_rows(backend, poison, random, integers, device, dtype, gathered):
    """Each token its own row of scale and shift, by its place in the whole sequence; -1 is the norm alone."""
    x = random(2, 21, 40, dtype=dtype, device=device)
    scale, shift = (random(2, 3, 40, dtype=dtype, device=device) for _ in range(2))
    of_token = integers(-1, 3, (2, 21), device)
    index = integers(-1, 21, (2, 30), device) if gathered else None
    y = check(x, scale, shift, of_token, index)
    if not gathered:
        plain = op(x, torch.zeros_like(scale[:, 0]), torch.zeros_like(shift[:, 0]))
        assert torch.equal(y[of_token < 0], plain[of_token < 0])
        assert not torch.equal(y[of_token >= 0], plain[of_token >= 0])


def test_a_vector_for_each_token(backend, poison, random, device):
    x, scale, shift = (random(2, 13, 40, device=device) for _ in range(3))
    y = op(x, scale, shift, modulation_index=torch.arange(13, dtype=torch.int32, device=device).expand(2, -1))
    want = torch.nn.functional.layer_norm(x, (40,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qwen_zero_cond_t_of_diffusers(backend, random, device, dtype):
    """Two sets of one projection, [2 B, 6 C] in chunks, chosen by token as QwenImageTransformerBlock chooses."""
    diffusers = pytest.importorskip("diffusers.models.transformers.transformer_qwenimage")
    x = random(2, 9, 32, dtype=dtype, device=device)
    projected = random(4, 6 * 32, dtype=dtype, device=device).chunk(2, dim=-1)[1]
    modulate_index = torch.tensor([[0] * 5 + [1] * 4] * 2, device=device)
    block = diffusers.QwenImageTransformerBlock
    theirs = block._modulate(None, torch.nn.functional.layer_norm(x, (32,), eps=1e-6), projected, modulate_index)[0]
    shift, scale, _ = projected.unflatten(0, (2, -1)).transpose(0, 1).chunk(3, dim=-1)
    ours = op(x, scale, shift, modulation_index=modulate_index.int())
    exact = reference(x.double(), scale.double(), shift.double(), modulate_index.int(), None, 1e-6)
    assert_within_budget(ours, exact, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adaln_zero_of_diffusers(backend, random, device, dtype):
    normalization = pytest.importorskip("diffusers.models.normalization")
    theirs = normalization.AdaLayerNormZeroSingle(64).to(device, dtype)
    x, emb = random(2, 9, 64, dtype=dtype, device=device), random(2, 64, dtype=dtype, device=device)
    with torch.no_grad():
        want, _ = theirs(x, emb)
        shift, scale, _ = theirs.linear(theirs.silu(emb)).chunk(3, dim=1)
        assert_within_budget(op(x, scale, shift), reference(x.double(), scale, shift, None, None, 1e-6), want)


def test_strides_and_dtypes_of_the_modulation(backend, poison, random, integers, device):
    """Chunks of one projection, rows of a longer sequence, fp32 vectors beside bf16 tokens."""
    x = random(3, 40, 60, dtype=torch.bfloat16, device=device)[1:, ::3, 5:55]
    shift, scale = random(2, 6 * 50, device=device).chunk(6, dim=-1)[1:3]
    check(x, scale, shift, index=integers(-1, 14, (2, 20), device)[:, ::2])
    rows = random(4, 3 * 50, device=device).unflatten(0, (2, -1)).transpose(0, 1)
    check(x, *rows.chunk(3, dim=-1)[:2], integers(0, 2, (14, 2), device).T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_mean(backend, poison, random, device, dtype):
    """The deviation is not lost beside a mean a hundred times as large."""
    x = random(1, 8, 256, dtype=dtype, device=device) + 100
    zero = torch.zeros(1, 256, dtype=dtype, device=device)
    oracle = reference(x.double(), zero.double(), zero.double(), None, None, 1e-6)
    error = (op(x, zero, zero).double() - oracle).abs().max()
    # fp32's own rounding of the mean: 100 * 2^-24 of a deviation of 1, and the result's rounding at 4.
    assert error <= 2e-5 + 4 * torch.finfo(dtype).eps


def test_constant_rows_and_eps(backend, poison, device):
    """No deviation: the shift alone; eps is what divides."""
    x = torch.full((1, 2, 64), 3.0, device=device)
    x[0, 1] = torch.tensor([1e-3, -1e-3], device=device).repeat(32)
    scale, shift = torch.zeros(1, 64, device=device), torch.full((1, 64), 0.5, device=device)
    y = op(x, scale, shift, eps=3e-6)
    assert torch.equal(y[0, 0], shift[0])
    torch.testing.assert_close(y[0, 1] - 0.5, x[0, 1] / 2e-3, rtol=1e-5, atol=1e-6)


def test_gather_is_gather_of_all(backend, random, integers, device):
    """Active rows get the bits that they would get among all; the same call gives the same bits."""
    x = random(2, 33, 96, dtype=torch.bfloat16, device=device)
    scale, shift = (random(2, 96, dtype=torch.bfloat16, device=device) for _ in range(2))
    index = integers(-1, 33, (2, 50), device)
    whole = op(x, scale, shift)
    assert torch.equal(op(x, scale, shift), whole)
    assert torch.equal(op(x, scale, shift, index=index), torch.ops.specedit.gather_tokens(whole, index, 50))


def test_an_index_out_of_range_is_an_empty_slot(device):
    """The kernel itself reads nothing there; on CPU, and when debugging, the op refuses such an index before."""
    launch = pytest.importorskip("specedit_kernels.triton_kernels.adaln_modulate").adaln_modulate
    x = torch.full((1, 2, 8), 3.0, device=device)
    index, of_token = (
        torch.tensor([values], dtype=torch.int32, device=device) for values in ([1, -7, 0, 2, 2**31 - 1], [0, 5])
    )
    y = launch(x, torch.ones(1, 2, 8, device=device), torch.ones(1, 2, 8, device=device), of_token, index, 1e-6)
    assert y[0, 2].eq(1).all() and not y[0, [0, 1, 3, 4]].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter: 1 / sqrt(0)
def test_empty(backend, poison, random, device):
    x, vector = random(2, 5, 16, device=device), random(2, 16, device=device)
    nowhere = torch.full((2, 4), -1, dtype=torch.int32, device=device)
    assert op(x[:, :0], vector, vector).shape == (2, 0, 16)
    assert op(x[:0], vector[:0], vector[:0]).shape == (0, 5, 16)
    assert op(x, vector, vector, index=nowhere[:, :0]).shape == (2, 0, 16)
    for tokens, eps in ((x, 1e-6), (x, 0.0), (x[:, :0], 1e-6)):
        y = op(tokens, vector, vector, index=nowhere, eps=eps)
        assert y.shape == (2, 4, 16) and not y.any()


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(x=torch.ones(3, 8)), ValueError, r"x: expected shape \[B, N, C\]"),
        (dict(x=torch.ones(1, 3, 8).int()), TypeError, "x: expected dtype bfloat16 or"),
        (dict(x=torch.ones(1, 8, 3).mT), ValueError, "x: expected a contiguous last dimension"),
        (dict(scale=torch.ones(1, 3, 8)), ValueError, r"scale: expected shape \[1, 8\], since modulation_index is N"),
        (dict(shift=torch.ones(2, 8)), ValueError, r"shift: expected shape \[1, 8\]"),
        (dict(modulation_index=torch.zeros(1, 3).int()), ValueError, r"scale: expected shape \[1, M, 8\], since"),
        (dict(scale=torch.ones(1, 2, 8), shift=torch.ones(1, 1, 8), modulation_index=torch.zeros(1, 3).int()),
         ValueError, r"shift: expected shape \[1, 2, 8\]"),
        (dict(scale=torch.ones(1, 2, 8), shift=torch.ones(1, 2, 8), modulation_index=torch.zeros(1, 2).int()),
         ValueError, r"modulation_index: expected shape \[1, 3\]"),
        (dict(scale=torch.ones(1, 2, 8), shift=torch.ones(1, 2, 8), modulation_index=torch.tensor([[0, 2, 1]]).int()),
         ValueError, "modulation_index: expected values from -1 to 1"),
        (dict(index=torch.zeros(2, 3).int()), ValueError, r"index: expected shape \[1, n\]"),
        (dict(index=torch.zeros(1, 3).long()), TypeError, "index: expected dtype int32"),
        (dict(index=torch.tensor([[3]]).int()), ValueError, "index: expected values from -1 to 2"),
        (dict(scale=torch.ones(1, 8, requires_grad=True)), ValueError, "scale: expected a tensor that does not"),
    ],
)  # fmt: skip
def test_bad_input(change, error, words):
    call = dict(x=torch.ones(1, 3, 8), scale=torch.ones(1, 8), shift=torch.ones(1, 8)) | change
    with pytest.raises(error, match=words):
        op(**call)


@pytest.mark.gpu  # launches are a matter of GPUs
def test_one_launch(random, integers, device):
    x = random(1, 70, 3072, dtype=torch.bfloat16, device=device)
    rows = random(1, 2, 3072, dtype=torch.bfloat16, device=device)
    options = dict(modulation_index=integers(0, 2, (1, 70), device), index=integers(-1, 70, (1, 33), device))
    assert len(launches(lambda: op(x, rows, rows, **options))) == 1
