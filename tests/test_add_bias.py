# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from budget import assert_within_budget
from calls import channels_last, launches

from specedit_kernels.reference.add_bias import add_bias_ as reference

op = torch.ops.specedit.add_bias_
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager(x, bias, residual, residual_bias):
    """What PyTorch computes behind a convolution: each sum rounded."""
    of_channel = (-1, *[1] * (x.dim() - 2))
    y = x + bias.to(x.dtype).view(of_channel)
    if residual is None:
        return y
    return residual + (0 if residual_bias is None else residual_bias.to(x.dtype).view(of_channel)) + y


def check(x, bias, residual=None, residual_bias=None):
    fresh, exact, before = eager(x, bias, residual, residual_bias), x.double(), x.stride()
    of_inputs = [None if v is None else v.double() for v in (bias, residual, residual_bias)]
    kept = None if residual is None else residual.clone()
    reference(exact, *of_inputs)
    assert op(x, bias, residual, residual_bias) is None
    assert x.stride() == before and (kept is None or torch.equal(residual, kept))
    assert_within_budget(x, exact, fresh)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "shape", [(2, 6, 5, 7), (1, 64, 33, 9), (3, 3, 11, 13), (2, 12, 3), (1, 130, 1, 1), (2, 1, 9, 9)], ids=str
)
def test_shapes(backend, poison, random, device, shape, layout, dtype):
    def maps():
        return layout(random(*shape, dtype=dtype, device=device))

    bias, other = (random(shape[1], dtype=dtype, device=device) for _ in range(2))
    check(maps(), bias)
    check(maps(), bias, maps())
    check(maps(), bias, maps(), other)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=lambda f: f.__name__)
def test_several_tiles_and_a_bias_of_another_dtype(backend, poison, random, device, layout):
    x, residual = (layout(random(2, 24, 37, 41, dtype=torch.bfloat16, device=device)) for _ in range(2))
    bias, other = random(24, device=device), random(24, dtype=torch.float16, device=device)
    check(x, bias, residual, other)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of numpy, in Triton's interpreter
def test_what_is_out_of_range_is_infinite(backend, device):
    x = torch.tensor([6e4, -6e4, 6e4, 1.0], dtype=torch.float16, device=device).view(1, 2, 2)
    bias = torch.tensor([0.0, 6e4], device=device)
    residual = torch.tensor([6e4, -6e4, 0.0, float("nan")], dtype=torch.float16, device=device).view(1, 2, 2)
    op(x, bias, residual)
    assert x[0, 0, 0] == float("inf") and x[0, 0, 1] == float("-inf") and x[0, 1, 0].isinf() and x[0, 1, 1].isnan()


def test_a_part_of_a_batch_and_its_own_residual(backend, random, device):
    whole = channels_last(random(3, 5, 4, 6, device=device))
    before, bias = whole.clone(), random(5, device=device)
    op(whole[1:2], bias, whole[1:2])
    assert torch.equal(whole[::2], before[::2])
    torch.testing.assert_close(whole[1], 2 * before[1] + bias[:, None, None])


def test_empty(backend, device):
    for shape in ((0, 4, 3, 3), (2, 4, 0)):
        op(torch.ones(shape, device=device), torch.ones(4, device=device))


MAP = torch.ones(1, 4, 6, 6)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(x=torch.ones(4, 3)), ValueError, r"x: expected \[B, C, H, W\] or \[B, C, N\], got \[4, 3\]"),
        (dict(x=MAP.double()), TypeError, "x: expected dtype bfloat16 or float16 or float32, got"),
        (dict(x=MAP[..., ::2]), ValueError, "x: expected a contiguous tensor or one with channels"),
        (dict(bias=torch.ones(3)), ValueError, r"bias: expected shape \[4\], got \[3\]"),
        (dict(bias=torch.ones(4).int()), TypeError, "bias: expected dtype bfloat16"),
        (dict(residual=MAP[..., :3]), ValueError, r"residual: expected shape \[1, 4, 6, 6\], got"),
        (dict(residual=MAP.half()), TypeError, "residual: expected x's dtype"),
        (dict(residual=channels_last(MAP)), ValueError, "residual: expected x's memory format, contiguous"),
        (dict(residual_bias=torch.ones(4)), ValueError, "residual_bias: expected None, since residual is None"),
        (dict(residual=MAP, residual_bias=torch.ones(8)[::2]), ValueError, "residual_bias: expected a contiguous last"),
    ],
)
def test_bad_input(change, error, words):
    call = dict(x=MAP.clone(), bias=torch.ones(4)) | change
    with pytest.raises(error, match=words):
        op(**call)
    assert call["x"].eq(1).all()


@pytest.mark.gpu  # launches are a matter of GPUs
def test_one_launch(random, device):
    x, residual = (channels_last(random(1, 128, 64, 64, dtype=torch.bfloat16, device=device)) for _ in range(2))
    bias = random(128, dtype=torch.bfloat16, device=device)
    assert len(launches(lambda: op(x, bias, residual, bias))) == 1


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 14 << 30, reason="needs a GPU with 14 GB free"
)
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=lambda f: f.__name__)
def test_offsets_beyond_32_bits(layout, device):
    batch = 2**31 // (64 * 1024 * 1024) + 2
    x = layout(torch.zeros(batch, 64, 1024, 1024, dtype=torch.bfloat16, device=device))
    bias = torch.arange(64, device=device).float()
    op(x, bias)
    assert all(x[i].eq(bias[:, None, None]).all() for i in (0, -1))
