# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from budget import assert_within_budget
from calls import channels_last, launches

from specedit_kernels.reference.group_norm import group_norm as reference

op = torch.ops.specedit.group_norm
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Triton's interpreter computes exp of masked and of very negative numbers with numpy, which warns
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def eager(x, num_groups, weight, bias, eps, silu):
    """What diffusers computes: the norm, rounded, then the activation. Of a copy: the CPU's path for channels last
    takes a difference of squares."""
    y = torch.nn.functional.group_norm(x.contiguous(), num_groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    return torch.nn.functional.silu(y) if silu else y


def check(x, num_groups, weight, bias, eps=1e-6):
    for silu in (False, True):
        y = op(x, num_groups, weight, bias, eps=eps, silu=silu)
        assert y.stride() == x.stride()
        oracle = reference(x.double(), num_groups, weight.double(), bias.double(), eps, silu)
        assert_within_budget(y, oracle, eager(x, num_groups, weight, bias, eps, silu))


@pytest.fixture
def parameters(random, device):
    def make(channels, dtype=torch.float32):
        return [random(channels, dtype=dtype, device=device) for _ in range(2)]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "shape, num_groups",
    [((2, 6, 5, 7), 3), ((1, 64, 33, 9), 8), ((1, 8, 64, 65), 1), ((2, 12, 3), 12), ((3, 130, 1, 11), 2)],
    ids=str,
)
def test_shapes(backend, poison, random, parameters, device, shape, num_groups, layout, dtype):
    x = layout(random(*shape, dtype=dtype, device=device) * 3 + 1)
    check(x, num_groups, *parameters(shape[1], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=lambda f: f.__name__)
def test_a_map_in_parts(backend, poison, random, parameters, device, layout, dtype):
    """With the statistics of all parts a part gets what it gets in the whole."""
    x = layout(random(2, 12, 7, 9, dtype=dtype, device=device) * 3 + torch.arange(7, device=device)[:, None].to(dtype))
    weight, bias = parameters(12)
    parts, shares = [layout(part) for part in x.split([5, 2], dim=2)], torch.tensor([5 / 7, 2 / 7], device=device)
    found = torch.stack([torch.ops.specedit.group_norm_statistics(part, 3) for part in parts], dim=-1)
    means, variances = found
    mean = means @ shares
    statistics = torch.stack([mean, (variances + (means - mean[..., None]).square()) @ shares])
    groups = x.double().unflatten(1, (3, 4)).flatten(2)
    expected = torch.stack([groups.mean(2), groups.var(2, correction=0)])
    torch.testing.assert_close(statistics.double(), expected, rtol=1e-5, atol=1e-5)
    for silu in (False, True):
        oracle = reference(x.double(), 3, weight.double(), bias.double(), 1e-6, silu)
        y = [op(part, 3, weight, bias, silu=silu, statistics=statistics) for part in parts]
        assert_within_budget(torch.cat(y, dim=2), oracle, eager(x, 3, weight, bias, 1e-6, silu))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=lambda f: f.__name__)
def test_a_bias_before(backend, poison, random, parameters, device, layout, dtype):
    """The norm of x + x_bias, and its statistics; large biases, which part the means of a group's channels."""
    x = layout(random(2, 12, 7, 9, dtype=dtype, device=device))
    weight, bias = parameters(12)
    x_bias = (20 * random(12, device=device)).to(dtype)
    exact = x.double() + x_bias.double()[:, None, None]
    eager_x = x + x_bias[:, None, None]
    found = torch.ops.specedit.group_norm_statistics(x, 3, x_bias=x_bias)
    groups = exact.unflatten(1, (3, 4)).flatten(2)
    expected = torch.stack([groups.mean(2), groups.var(2, correction=0)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    for silu in (False, True):
        oracle = reference(exact, 3, weight.double(), bias.double(), 1e-6, silu)
        for statistics in (None, found):
            y = op(x, 3, weight, bias, silu=silu, statistics=statistics, x_bias=x_bias)
            assert y.stride() == x.stride()
            assert_within_budget(y, oracle, eager(eager_x, 3, weight, bias, 1e-6, silu))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("programs", [1, 7])
def test_chunks_of_many_tiles(poison, random, parameters, device, monkeypatch, layout, programs):
    """Large pictures: a program takes several tiles, the last one fewer, of means that differ."""
    kernel = pytest.importorskip("specedit_kernels.triton_kernels.group_norm")
    monkeypatch.setenv("SPECEDIT_BACKEND", "triton")
    monkeypatch.setattr(kernel, "_PROGRAMS", programs)
    x = random(2, 6, 70, 61, device=device) + torch.linspace(-5, 5, 70, device=device)[:, None]
    check(layout(x), 3, *parameters(6))


def test_many_parts_of_a_group(backend, poison, random, parameters, device):
    """More than the launch that combines them takes at once."""
    check(random(1, 9000, 2, device=device), 1, *parameters(9000))


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_mean(backend, poison, random, device, dtype, layout):
    """The deviation is not lost beside a mean a hundred times as large."""
    x = layout(random(1, 4, 40, 60, dtype=dtype, device=device) + 100)
    one = torch.ones(4, dtype=dtype, device=device)
    oracle = reference(x.double(), 2, one.double(), one.double() * 0, 1e-6, False)
    error = (op(x, 2, one, one * 0).double() - oracle).abs().max()
    # fp32's own rounding of the mean, a few of its steps at 100, and the result's rounding at 5
    assert error <= 4e-5 + 5 * torch.finfo(dtype).eps


def test_constant_groups_and_eps(backend, poison, device):
    """No deviation: the bias alone; eps is what divides."""
    x = torch.full((1, 2, 8, 8), 3.0, device=device)
    x[0, 1] = torch.tensor([1e-3, -1e-3], device=device).repeat(32).view(8, 8)
    weight, bias = torch.ones(2, device=device), torch.full((2,), 0.5, device=device)
    y = op(x, 2, weight, bias, eps=3e-6)
    assert y[0, 0].eq(0.5).all()
    torch.testing.assert_close(y[0, 1] - 0.5, x[0, 1] / 2e-3, rtol=1e-5, atol=1e-6)


def test_nan_stays_in_its_group(backend, random, parameters, device):
    x = random(2, 6, 9, 9, device=device)
    x[1, 2, 3, 4] = float("nan")
    lost = op(x, 3, *parameters(6), silu=True).isnan().flatten(2)
    assert lost[1, 2:4].all() and lost.sum() == 2 * 81


def test_far_below_zero_silu_is_zero(backend, device):
    x = torch.tensor([[[1.0, -1.0]]], device=device)
    y = op(x, 1, torch.full((1,), 300.0, device=device), torch.zeros(1, device=device), silu=True)
    torch.testing.assert_close(y, torch.tensor([[[300.0, 0.0]]], device=device), rtol=1e-5, atol=1e-30)


@pytest.mark.slow
def test_parameters_of_another_dtype_and_the_same_bits_again(backend, random, parameters, device):
    x = random(1, 32, 31, 33, dtype=torch.bfloat16, device=device)
    check(x, 8, *(v.to(torch.bfloat16).float() for v in parameters(32)))
    weight, bias = parameters(32)
    first = op(x, 8, weight, bias, silu=True)
    assert all(torch.equal(first, op(x, 8, weight, bias, silu=True)) for _ in range(3))


def test_empty(backend, parameters, device):
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 0)):
        assert op(torch.ones(shape, device=device), 2, *parameters(4)).shape == shape
        found = torch.ops.specedit.group_norm_statistics(torch.ones(shape, device=device), 2)
        assert found.shape == (2, shape[0], 2) and found.isnan().all()


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(x=torch.ones(4, 3)), ValueError, r"x: expected \[B, C, H, W\] or \[B, C, N\], got \[4, 3\]"),
        (dict(x=torch.ones(1, 4, 3).double()), TypeError, "x: expected dtype bfloat16 or float16 or float32, got"),
        (dict(x=torch.ones(1, 4, 6, 6)[..., ::2]), ValueError, "x: expected a contiguous tensor or one with channels"),
        (dict(num_groups=3), ValueError, "num_groups: expected a divisor of x's 4 channels, got 3"),
        (dict(num_groups=0), ValueError, "num_groups: expected a divisor of x's 4 channels, got 0"),
        (dict(weight=torch.ones(3)), ValueError, r"weight: expected shape \[4\], got \[3\]"),
        (dict(bias=torch.ones(4).int()), TypeError, "bias: expected dtype bfloat16"),
        (dict(bias=torch.ones(8)[::2]), ValueError, "bias: expected a contiguous last"),
        (dict(x_bias=torch.ones(5)), ValueError, r"x_bias: expected shape \[4\], got \[5\]"),
        (dict(statistics=torch.ones(2, 1, 2).double()), TypeError, "statistics: expected dtype float32"),
        (dict(statistics=torch.ones(2, 2)), ValueError, r"statistics: expected shape \[2, B, num_groups\]"),
        (dict(statistics=torch.ones(2, 1, 4)[..., ::2]), ValueError, "statistics: expected a contiguous"),
        (dict(weight=torch.ones(4, requires_grad=True)), ValueError, "weight: expected a tensor that does not"),
    ],
)
def test_bad_input(change, error, words):
    call = dict(x=torch.ones(1, 4, 3, 3), num_groups=2, weight=torch.ones(4), bias=torch.ones(4)) | change
    with pytest.raises(error, match=words):
        op(**call)


@pytest.mark.gpu  # launches are a matter of GPUs
def test_three_launches(random, parameters, device):
    x = random(1, 128, 64, 64, dtype=torch.bfloat16, device=device)
    weight, bias = parameters(128)
    assert len(launches(lambda: op(x, 32, weight, bias, silu=True))) == 3


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 14 << 30, reason="needs a GPU with 14 GB free"
)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=lambda f: f.__name__)
def test_offsets_beyond_32_bits(layout, device):
    """The last sample of many gets what it gets alone, but for the order of sums."""
    batch, weight = 2**31 // (64 * 1024 * 1024) + 2, torch.ones(64, device=device)
    x = layout(torch.zeros(batch, 64, 1024, 1024, dtype=torch.bfloat16, device=device))
    x[-1].normal_()
    y = op(x, 32, weight, weight * 0)
    assert not y[:-1].any()
    torch.testing.assert_close(y[-1:], op(x[-1:].clone(), 32, weight, weight * 0), rtol=2**-7, atol=1e-6)
