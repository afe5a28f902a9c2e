# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

op = torch.ops.specedit.cast_fp8
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", FP8, ids=str)
def test_all_numbers_have_the_bits_of_torchs_cast(backend, poison, device, kind, dtype):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    got, expected = op(codes.view(kind), dtype), codes.cpu().view(kind).to(dtype)
    assert got.dtype == dtype and got.device.type == device.type
    nan = expected.isnan()
    assert torch.equal(got.cpu().isnan(), nan) and nan.any()
    assert torch.equal(got.cpu().view(torch.int16)[~nan], expected.view(torch.int16)[~nan])
    # zeros and subnormal numbers with their signs
    assert torch.equal(got.cpu().signbit()[~nan], expected.signbit()[~nan])


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 5), (1, 8193), (2, 4096, 3)], ids=str)
def test_all_shapes(backend, poison, random, device, shape):
    x = (random(*shape, 1, device=device)[..., 0] * 20).to(FP8[0])
    got = op(x, torch.bfloat16)
    assert got.shape == x.shape and got.is_contiguous() and torch.equal(got.float(), x.float())


@pytest.mark.parametrize(
    "x, dtype, error, words",
    [
        (torch.ones(3), torch.bfloat16, TypeError, "x: expected dtype float8_e4m3fn or float8_e5m2, got float32"),
        (torch.ones(3).to(FP8[0]), torch.float32, TypeError, "dtype: expected bfloat16 or float16, got float32"),
        (torch.ones(3, 2).to(FP8[0]).t(), torch.bfloat16, ValueError, "x: expected a contiguous tensor, got strides"),
    ],
)
def test_bad_input(x, dtype, error, words):
    with pytest.raises(error, match=words):
        op(x, dtype)
