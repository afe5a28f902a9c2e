# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from budget import assert_within_budget
from calls import launches

from specedit_kernels.reference.scaled_softmax import scaled_softmax as reference

op = torch.ops.specedit.scaled_softmax
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(x, scale, dtype):
    y = op(x, scale, dtype)
    assert y.is_contiguous()
    assert_within_budget(y, reference(x.double(), scale, torch.float64), torch.softmax(x.float() * scale, -1).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 64, 127, 999, 2048])
def test_odd_lengths(backend, poison, random, device, size, dtype):
    check(random(3, 5, size, device=device) * 20, 384**-0.5, dtype)
    check(random(11, size, dtype=dtype, device=device), -1.5, torch.float32)


@pytest.mark.parametrize("size", [64, 65, 200])
def test_rows_longer_than_a_program_keeps(poison, random, device, monkeypatch, size):
    kernel = pytest.importorskip("specedit_kernels.triton_kernels.scaled_softmax")
    monkeypatch.setenv("SPECEDIT_BACKEND", "triton")
    monkeypatch.setattr(kernel, "_ELEMENTS", 64)
    x = random(4, size, device=device) * 10
    x[1, -1], x[2, :5] = 60.0, float("-inf")
    check(x, 0.7, torch.bfloat16)
    assert not op(x, 0.7, torch.float32)[2, :5].any()


@pytest.mark.gpu  # large for the interpreter
@pytest.mark.parametrize("size", [16384, 16385, 65536])
def test_rows_of_a_large_picture(poison, random, device, size):
    x = random(64, size, device=device) * 30
    check(x, 512**-0.5, torch.bfloat16)
    assert torch.equal(op(x, 512**-0.5, torch.bfloat16), op(x, 512**-0.5, torch.bfloat16))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in Triton's interpreter
def test_far_scores_and_what_is_no_number(backend, random, device):
    x = torch.tensor([[3e4, 0.0, -3e4], [float("-inf"), 1.0, 1.0], [0.0, float("nan"), 1.0]], device=device)
    y = op(x, 1.0, torch.float32)
    assert y[:2].tolist() == [[1, 0, 0], [0, 0.5, 0.5]] and y[2].isnan().all()
    assert op(torch.full((1, 3), float("-inf"), device=device), 1.0, torch.float32).isnan().all()


def test_empty(backend, device):
    for shape in ((0, 4), (2, 0), (0,)):
        assert op(torch.ones(shape, device=device), 1.0, torch.float16).shape == shape


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(x=torch.ones(3).double()), TypeError, "x: expected dtype bfloat16 or float16 or float32, got"),
        (dict(x=torch.ones(())), ValueError, r"x: expected \[..., N\], got \[\]"),
        (dict(x=torch.ones(4, 6)[:, ::2]), ValueError, "x: expected a contiguous tensor, got strides"),
        (dict(scale=float("inf")), ValueError, "scale: expected a finite number"),
        (dict(dtype=torch.int32), TypeError, "dtype: expected bfloat16, float16 or float32, got int32"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        op(**dict(x=torch.ones(2, 3), scale=1.0, dtype=torch.float32) | change)


@pytest.mark.gpu  # launches are a matter of GPUs
def test_one_launch(random, device):
    x = random(64, 4096, device=device)
    assert len(launches(lambda: op(x, 0.5, torch.bfloat16))) == 1
