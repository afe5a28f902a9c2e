# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from calls import channels_last, launches

from specedit_kernels.reference.channel_rms_norm import channel_rms_norm as reference

op = torch.ops.specedit.channel_rms_norm
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Triton's interpreter computes exp of masked and of very negative numbers with numpy, which warns
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def eager(x, weight, bias, eps, silu, x_bias):
    """What diffusers computes: the length in fp32, each step rounded."""
    weight, bias, x_bias = (
        None if v is None else v.to(x.dtype).view(-1, *[1] * (x.dim() - 2)) for v in (weight, bias, x_bias)
    )
    x = x if x_bias is None else x + x_bias
    y = F.normalize(x.float(), dim=1, eps=eps).to(x.dtype) * x.shape[1] ** 0.5 * weight
    y = y if bias is None else y + bias
    return F.silu(y) if silu else y


def check(x, weight, bias=None, x_bias=None, eps=1e-12):
    before = x.clone()
    for silu in (False, True):
        y = op(x, weight, bias, eps=eps, silu=silu, x_bias=x_bias)
        assert y.stride() == x.stride() and torch.equal(x, before)
        of_oracle = [None if v is None else v.double() for v in (weight, bias)]
        oracle = reference(x.double(), *of_oracle, eps, silu, None if x_bias is None else x_bias.double())
        assert_within_budget(y, oracle, eager(x, weight, bias, eps, silu, x_bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "shape",
    [(2, 6, 5, 7), (1, 96, 33, 9), (1, 384, 3, 3), (2, 1, 9, 9), (2, 12, 3), (3, 130, 1, 11), (1, 9000, 2)],
    ids=str,
)
def test_shapes(backend, poison, random, device, shape, layout, dtype):
    x = layout(random(*shape, dtype=dtype, device=device) * 3 + 1)
    weight, bias, x_bias = (random(shape[1], dtype=dtype, device=device) for _ in range(3))
    check(x, weight)
    check(x, weight, bias, x_bias)


def test_vectors_of_another_dtype(backend, poison, random, device):
    x = channels_last(random(2, 24, 7, 9, dtype=torch.bfloat16, device=device))
    weight, x_bias = random(24, device=device), random(24, dtype=torch.float16, device=device)
    y = op(x, weight, silu=True, x_bias=x_bias)
    oracle = reference(x.double(), weight.double(), None, 1e-12, True, x_bias.double())
    assert_within_budget(y, oracle, eager(x, weight, None, 1e-12, True, x_bias))


def test_short_pixels_and_what_is_no_number(backend, device):
    x = torch.tensor([[0.0, 0.0], [3e-13, 4e-13], [float("nan"), 1.0], [float("inf"), 1.0]], device=device).T[None]
    y = op(x.contiguous(), torch.ones(2, device=device))
    expected = eager(x, torch.ones(2, device=device), None, 1e-12, False, None)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert y[0, :, 0].eq(0).all() and y[0, :, 1].lt(1).all() and y[0, :, 2].isnan().all()
    # a bias that is all there is
    found = op(
        torch.zeros(1, 2, 1, device=device),
        torch.ones(2, device=device),
        x_bias=torch.tensor([3.0, 4.0], device=device),
    )
    torch.testing.assert_close(found[0, :, 0], torch.tensor([0.6, 0.8], device=device) * 2**0.5)


def test_empty(backend, device):
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 0)):
        assert op(torch.ones(shape, device=device), torch.ones(4, device=device)).shape == shape


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(x=torch.ones(4, 3)), ValueError, r"x: expected \[B, C, H, W\] or \[B, C, N\], got \[4, 3\]"),
        (dict(x=torch.ones(1, 4, 3).double()), TypeError, "x: expected dtype bfloat16 or float16 or float32, got"),
        (dict(x=torch.ones(1, 4, 6, 6)[..., ::2]), ValueError, "x: expected a contiguous tensor or one with channels"),
        (dict(weight=torch.ones(3)), ValueError, r"weight: expected shape \[4\], got \[3\]"),
        (dict(bias=torch.ones(4).int()), TypeError, "bias: expected dtype bfloat16"),
        (dict(x_bias=torch.ones(8)[::2]), ValueError, "x_bias: expected a contiguous last"),
        (dict(eps=-1.0), ValueError, "eps: expected a finite number >= 0"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        op(**dict(x=torch.ones(1, 4, 3, 3), weight=torch.ones(4)) | change)


@pytest.mark.gpu  # launches are a matter of GPUs
def test_one_launch_and_the_same_bits_again(random, device):
    x = channels_last(random(1, 96, 64, 64, dtype=torch.bfloat16, device=device))
    weight = random(96, device=device)
    assert len(launches(lambda: op(x, weight, silu=True, x_bias=weight))) == 1
    first = op(x, weight, silu=True, x_bias=weight)
    assert all(torch.equal(first, op(x, weight, silu=True, x_bias=weight)) for _ in range(3))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 14 << 30, reason="needs a GPU with 14 GB free"
)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=lambda f: f.__name__)
def test_offsets_beyond_32_bits(layout, device):
    batch, weight = 2**31 // (64 * 1024 * 1024) + 2, torch.ones(64, device=device)
    x = layout(torch.zeros(batch, 64, 1024, 1024, dtype=torch.bfloat16, device=device))
    x[-1].normal_()
    y = op(x, weight)
    assert not y[:-1].any() and torch.equal(y[-1:], op(x[-1:].clone(), weight))
