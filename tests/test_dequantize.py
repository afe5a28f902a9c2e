# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

op = torch.ops.specedit.dequantize
KINDS = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BITS = {2: torch.int16, 4: torch.int32}


def assert_bits(got, expected):
    """Equal to the last bit, signs of zeros too; of NaN the place alone."""
    got, expected = got.cpu(), expected.cpu()
    assert got.dtype == expected.dtype and got.shape == expected.shape and got.is_contiguous()
    nan, kind = expected.isnan(), BITS[expected.element_size()]
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got.view(kind)[~nan], expected.view(kind)[~nan])


def rounded(x, dtype, backend):
    """fp32 numbers in dtype. Triton's interpreter cuts bf16's off, where the hardware rounds."""
    if dtype == torch.bfloat16 and backend == "triton" and not torch.cuda.is_available():
        x = torch.where(x.isnan(), x, (x.view(torch.int32) & -65536).view(torch.float32))
    return x.to(dtype)


def codes_of(integers, kind, *shape, device):
    """Numbers of all codes."""
    codes = integers(0, 256, shape, device, torch.uint8)
    return codes.view(kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_all_numbers_have_the_bits_of_torchs_cast(backend, poison, device, kind, dtype):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    expected = codes.cpu().view(kind).to(dtype)
    assert_bits(op(codes.view(kind), dtype), expected)
    assert expected.isnan().any() == (kind != torch.int8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_scaled_number_is_the_exact_product_rounded_once(backend, poison, random, integers, device, kind, dtype):
    """To fp32, where it may then be rounded to 16 bits: within half a step of each of float64's product."""
    x = codes_of(integers, kind, 37, 200, device=device)
    scale = (random(37, 1, device=device) * 2).exp() * 1e-3
    exact = x.cpu().double() * scale.cpu().double()
    got = op(x, dtype, scale=scale)
    assert_bits(got, rounded(exact.to(torch.float32), dtype, backend))
    there = exact.isfinite() & (exact.abs() < torch.finfo(dtype).max)
    error = (got.cpu().double() - exact).abs()[there]
    step = torch.finfo(dtype).eps * exact.abs()[there] + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert (error <= (1 if backend == "triton" and not torch.cuda.is_available() else 0.501) * step).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_scale_in_16_bits_gives_the_bits_of_a_product_in_them(backend, poison, random, integers, device, kind, dtype):
    """As a library has it that multiplies codes and scales in the weight's dtype: their product is exact in fp32."""
    x = codes_of(integers, kind, 5, 200, device=device)
    for scale in ((random(5, 1, device=device) * 1e-3).to(dtype), torch.full((1, 1), 3e-3, dtype=dtype, device=device)):
        own = scale.cpu().float() * x.cpu().float()
        assert_bits(op(x, dtype, scale=scale), rounded(own, dtype, backend))
        assert torch.equal((scale * x.to(dtype)).nan_to_num().cpu(), own.to(dtype).nan_to_num())


@pytest.mark.parametrize("scaled", ["", "by row", "one"])
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 0), (3, 5), (1, 8193), (2, 260, 3), (3, 9000), (2, 3, 1024)],
                         ids=str)  # fmt: skip
def test_all_shapes(backend, poison, random, integers, device, shape, scaled):
    if scaled == "by row" and not shape:
        pytest.skip("a number has no rows")
    x = codes_of(integers, torch.int8, *shape, device=device)
    scale, expected = None, x.cpu().float()
    if scaled:
        scale = random(*((*shape[:-1], 1) if scaled == "by row" else (1, 1)), device=device)
        expected = (expected * (scale.cpu() if scaled == "by row" else scale.item())).reshape(shape)
    assert_bits(op(x, torch.bfloat16, scale=scale), rounded(expected, torch.bfloat16, backend))


def test_a_part_of_a_tensor(backend, poison, random, integers, device):
    """Rows from the middle of others, at an odd address."""
    x, scale = codes_of(integers, torch.float8_e4m3fn, 9, 77, device=device), random(9, 1, device=device)
    got = op(x[3:6], torch.bfloat16, scale=scale[3:6])
    assert_bits(got, op(x, torch.bfloat16, scale=scale)[3:6].contiguous())


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_are_64_bits():
    rows, columns = 70001, 30720
    x = torch.zeros(rows, columns, dtype=torch.int8, device="cuda")
    x[-1] = 3
    scale = torch.arange(rows, dtype=torch.float32, device="cuda")[:, None]
    got = op(x, torch.bfloat16, scale=scale)
    assert (got[-1] == torch.tensor(3.0 * (rows - 1)).bfloat16().item()).all()
    assert (got[-2] == 0).all()


def test_it_undoes_quantize_fp8(backend, random, device):
    x = random(5, 64, device=device)
    values, scale = torch.ops.specedit.quantize_fp8(x)
    assert ((op(values, torch.float32, scale=scale) - x).abs() <= x.abs() / 16 + scale / 1024 + 1e-6).all()


ONE = torch.ones(3, 2, dtype=torch.int8)


@pytest.mark.parametrize(
    "x, dtype, scale, error, words",
    [
        (torch.ones(3), torch.bfloat16, None, TypeError,
         "x: expected dtype int8 or float8_e4m3fn or float8_e5m2, got float32"),
        (ONE, torch.float64, None, TypeError, "dtype: expected bfloat16, float16 or float32, got float64"),
        (ONE.t(), torch.bfloat16, None, ValueError, "x: expected a contiguous tensor, got strides"),
        (ONE, torch.bfloat16, torch.ones(3, 1).double(), TypeError,
         "scale: expected dtype bfloat16 or float16 or float32, got float64"),
        (ONE, torch.bfloat16, torch.ones(3), ValueError, r"scale: expected one number, or shape \[3, 1\], x's rows"),
        (ONE, torch.bfloat16, torch.ones(1, 2), ValueError, r"scale: expected one number, or shape \[3, 1\]"),
        (ONE, torch.bfloat16, torch.ones(3, 2)[:, :1], ValueError, "scale: expected a contiguous tensor, got strides"),
    ],
)  # fmt: skip
def test_bad_input(x, dtype, scale, error, words):
    with pytest.raises(error, match=words):
        op(x, dtype, scale=scale)
