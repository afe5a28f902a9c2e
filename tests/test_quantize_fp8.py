# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from calls import launches

from specedit_kernels.reference.quantize_fp8 import before_rounding

op = torch.ops.specedit.quantize_fp8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")


def check(x, scale=None, shift=None, modulation_index=None, before=None, gelu=False, eps=1e-6):
    """Every value within half a step of e4m3 of float64's, and the scale that of the row's largest magnitude.

    Half a step is 2^-4 of the number (three mantissa bits), and 2^-10 of the scale under the smallest normal number;
    what was rounded may itself be off by fp32's error, a few 2^-24 of the row's largest magnitude.
    """
    given = dict(scale=scale, shift=shift, modulation_index=modulation_index, before=before, gelu=gelu, eps=eps)
    values, row_scale = op(x, **given)
    doubles = (v if v is None else v.double() for v in (x, scale, shift))
    exact = before_rounding(*doubles, modulation_index, None if before is None else before.double(), gelu, eps)
    assert values.dtype == torch.float8_e4m3fn and row_scale.dtype == torch.float32
    assert values.is_contiguous() and row_scale.is_contiguous()
    assert values.shape == exact.shape and row_scale.shape == (*exact.shape[:-1], 1)
    if not exact.numel():
        return values, row_scale
    largest = exact.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(row_scale.double(), (largest / 448).clamp_min(2.0**-126), rtol=4e-6, atol=0)
    error = (values.double() * row_scale.double() - exact).abs()
    allowed = torch.maximum(exact.abs() / 16, row_scale.double() / 1024) + 4e-6 * largest + 2.0**-140
    assert (error <= allowed).all(), (error / allowed).max()
    # the largest of a row is at the end of e4m3's range
    assert ((values.float().abs().amax(-1, keepdim=True) == 448) | (largest < 448 * 2.0**-126)).all()
    return values, row_scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (5, 3), (2, 3, 64), (2, 7, 1000), (1, 3, 3072), (2, 5, 3, 128)], ids=str)
def test_rows(backend, poison, random, device, shape, dtype):
    check(random(*shape, dtype=dtype, device=device) * 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 64, 384, 1000, 3072])
def test_with_the_norm(backend, poison, random, device, channels, dtype):
    x = random(2, 5, channels, dtype=dtype, device=device) * 3 + 1
    check(x, *(random(2, channels, dtype=dtype, device=device) for _ in range(2)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 48), (2, 3, 1000), (2, 9, 5, 16), (1, 2, 9000)], ids=str)
def test_with_gelu(backend, poison, random, device, shape, dtype):
    check(random(*shape, dtype=dtype, device=device) * 4, gelu=True)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("channels", [(1, 40), (40, 1), (96, 384), (3072, 300)], ids=str)
def test_channels_before_others(backend, poison, random, device, channels, gelu):
    """One scale for both; the GELU is for the latter alone."""
    first, then = (random(2, 5, n, dtype=torch.bfloat16, device=device) for n in channels)
    values, _ = check(then * 0.1, before=first, gelu=gelu)
    assert (values[..., : channels[0]].float().abs().amax(-1) == 448).float().mean() > 0.5 or channels[0] == 1
    check(then * 100, before=first, gelu=gelu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modulation_rows(backend, poison, random, integers, device, dtype):
    x = random(2, 21, 40, dtype=dtype, device=device)
    scale, shift = (random(2, 3, 40, dtype=dtype, device=device) for _ in range(2))
    check(x, scale, shift, integers(-1, 3, (2, 21), device))


@pytest.mark.parametrize("gelu", [False, True])
def test_many_rows(backend, poison, random, device, gelu):
    check(random(1, 999, 10, device=device), gelu=gelu)
    if not gelu:
        check(random(3, 333, 10, device=device), *(random(3, 10, device=device) for _ in range(2)))


def test_strides(backend, poison, random, device):
    """Rows of a longer sequence, heads before rows, chunks of one projection."""
    check(random(3, 40, 60, dtype=torch.bfloat16, device=device)[1:, ::3, 5:55])
    check(random(2, 3, 40, 64, device=device).transpose(1, 2))
    packed = random(2, 9, 3, 4, 16, device=device)
    check(packed[:, :, 1])
    check(random(4, 48, device=device)[::2], before=random(4, 48, device=device)[1::2, :7])
    shift, scale = random(2, 6 * 50, device=device).chunk(6, dim=-1)[1:3]
    check(random(2, 40, 60, device=device)[:, ::3, 5:55], scale, shift, before=random(2, 14, 9, device=device)[..., 2:])
    rows = random(4, 3 * 50, device=device).unflatten(0, (2, -1)).transpose(0, 1)
    of_token = torch.tensor([[0, 1, 1, 0]] * 2, dtype=torch.int32, device=device).T.contiguous().T
    check(random(2, 4, 50, device=device), *rows.chunk(3, dim=-1)[:2], of_token)


@pytest.mark.parametrize("exponent", [-148, -130, -120, -100, 100, 120, 127])
def test_numbers_of_any_size(backend, poison, random, device, exponent):
    """A scale may not be lost to underflow, nor its reciprocal to overflow."""
    x = random(3, 50, device=device).clamp(-1.9, 1.9) * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)
    check(x)


def test_a_wide_range_within_a_row(backend, poison, device):
    """Normal numbers of e4m3, its subnormal ones, those that round to zero, and ties, which go to even ones."""
    x = torch.cat([torch.tensor([448.0]), 448 * 2.0 ** -torch.arange(1, 30).float(), -(2.0 ** -torch.arange(0, 12.0))])
    ties = torch.tensor([17.0, 19.0, 2.0**-10, 3 * 2.0**-10, 15.5, 2.0**-6 * 15.5 / 16, 7.5 * 2.0**-9, 255.0])
    values, row_scale = check(torch.cat([x, ties])[None].to(device))
    assert row_scale.item() == 1
    want = torch.tensor([16.0, 20.0, 0.0, 2.0**-8, 16.0, 2.0**-6, 2.0**-6, 256.0])
    assert torch.equal(values[0, -len(ties) :].float().cpu(), want)
    assert torch.equal(values[0, : len(x)].float().cpu(), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("options", ["plain", "norm", "gelu", "before"])
def test_zero_rows(backend, poison, device, options):
    x = torch.zeros(2, 3, 20, device=device)
    vectors = [torch.zeros(2, 20, device=device)] * 2 if options == "norm" else [None, None]
    before = torch.zeros(2, 3, 7, device=device) if options == "before" else None
    values, row_scale = op(x, scale=vectors[0], shift=vectors[1], gelu=options == "gelu", before=before)
    assert not values.float().any() and (row_scale == 2.0**-126).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter: inf / inf
def test_infinities_and_nans(backend, poison, random, device, dtype):
    """A row with an inf keeps its signs; a NaN makes the row's scale NaN; rows beside them are as they would be."""
    x = random(5, 40, dtype=dtype, device=device)
    clean = op(x)
    x[1, 3], x[1, 7] = INF, -INF
    x[3, 5], x[4, 0], x[4, 1] = NAN, NAN, INF
    values, row_scale = op(x)
    assert row_scale[1].item() == INF and row_scale[3].isnan().all() and row_scale[4].isnan().all()
    want = torch.zeros(40)
    want[3], want[7] = 448, -448
    assert torch.equal(values[1].float().cpu(), want)
    assert values[3].float().isnan().all()
    for row in (0, 2):
        assert torch.equal(values[row].float(), clean[0][row].float()) and torch.equal(row_scale[row], clean[1][row])
    vectors = [torch.ones(1, 40, dtype=dtype, device=device)] * 2
    assert op(x[None, 3:4], scale=vectors[0], shift=vectors[1])[1].isnan().all()
    assert op(x[None, 1:2], scale=vectors[0], shift=vectors[1])[1].isnan().all()
    assert op(x[3:4], gelu=True)[1].isnan().all()
    assert op(x[:1], before=x[3:4])[1].isnan().all() and op(x[:1], before=x[1:2])[1].item() == INF


def test_the_largest_numbers_are_no_infinities(backend, poison, device):
    x = torch.full((1, 4), torch.finfo(torch.float32).max, device=device)
    x[0, 1] = -x[0, 0]
    values, row_scale = op(x)
    assert row_scale.isfinite().all() and values.float().tolist() == [[448, -448, 448, 448]]


def test_equal_calls_give_equal_bits(backend, random, device):
    x = random(2, 33, 96, dtype=torch.bfloat16, device=device)
    a, b = op(x, gelu=True), op(x, gelu=True)
    assert torch.equal(a[0].view(torch.uint8), b[0].view(torch.uint8)) and torch.equal(a[1], b[1])
    part = op(x[:, 5:9], gelu=True)
    assert torch.equal(part[0].view(torch.uint8), a[0][:, 5:9].view(torch.uint8))


def test_empty(backend, poison, random, device):
    x = random(2, 5, 16, device=device)
    vectors = random(2, 16, device=device)
    for part in (x[:, :0], x[:0]):
        check(part)
        check(part, vectors[: len(part)], vectors[: len(part)])
        check(part, before=part, gelu=True)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(x=torch.ones(1, 3, 8).int()), TypeError, "x: expected dtype bfloat16 or"),
        (dict(x=torch.ones(1, 1, 1, 3, 8)), ValueError, r"x: expected shape \[..., C\] of 1 to 4 dimensions, C >= 1"),
        (dict(x=torch.ones(3, 0)), ValueError, r"x: expected shape \[..., C\]"),
        (dict(x=torch.ones(1, 8, 3).mT), ValueError, "x: expected a contiguous last dimension"),
        (dict(scale=torch.ones(1, 8)), ValueError, "shift: expected a tensor .*together.*got None"),
        (dict(shift=torch.ones(1, 8)), ValueError, "scale: expected a tensor"),
        (dict(scale=torch.ones(1, 9), shift=torch.ones(1, 9)), ValueError, r"scale: expected shape \[1, 8\]"),
        (dict(x=torch.ones(3, 8), scale=torch.ones(3, 8), shift=torch.ones(3, 8)), ValueError, r"x: expected sha"),
        (dict(scale=torch.ones(1, 8), shift=torch.ones(1, 8), gelu=True), ValueError, "gelu: expected False"),
        (dict(modulation_index=torch.zeros(1, 3).int()), ValueError, "modulation_index: expected None, since scale"),
        (dict(scale=torch.ones(1, 2, 8), shift=torch.ones(1, 2, 8), modulation_index=torch.tensor([[0, 2, 1]]).int()),
         ValueError, "modulation_index: expected values from -1 to 1"),
        (dict(before=torch.ones(1, 4, 8)), ValueError, r"before: expected shape \[1, 3\] \+ \[C0\], x's rows"),
        (dict(before=torch.ones(1, 3, 0)), ValueError, "before: expected at least one channel"),
        (dict(before=torch.ones(1, 8, 3).mT), ValueError, "before: expected a contiguous last dimension"),
        (dict(x=torch.ones(1, 3, 8, requires_grad=True)), ValueError, "x: expected a tensor that does not"),
    ],
)  # fmt: skip
def test_bad_input(change, error, words):
    call = dict(x=torch.ones(1, 3, 8)) | change
    with pytest.raises(error, match=words):
        op(call.pop("x"), **call)


def test_an_index_out_of_range_modulates_nothing(device):
    """The kernel itself reads nothing there; on CPU, and when debugging, the op refuses such an index before."""
    launch = pytest.importorskip("specedit_kernels.triton_kernels.quantize_fp8").quantize_fp8
    x = torch.tensor([1.0, -1.0] * 4, device=device).expand(1, 3, 8)
    of_token = torch.tensor([[-7, 5, 2**31 - 1]], dtype=torch.int32, device=device)
    ones = torch.ones(1, 2, 8, device=device)
    values, row_scale = launch(x, ones, ones, of_token, None, False, 0.0)
    torch.testing.assert_close(values.float() * row_scale, x)


@pytest.mark.gpu  # launches are a matter of GPUs
@pytest.mark.parametrize("options", ["norm", "gelu", "before"])
def test_one_launch(random, device, options):
    x = random(1, 70, 3072, dtype=torch.bfloat16, device=device)
    given = dict(norm=dict(scale=x[:, 0], shift=x[:, 1]), gelu=dict(gelu=True), before=dict(before=x, gelu=True))
    assert len(launches(lambda: op(x, **given[options]))) == 1


@pytest.mark.gpu  # more memory than the interpreter should be given
def test_offsets_beyond_32_bits(device):
    """The last rows of a tensor of more than 2^31 elements."""
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB")
    x = torch.zeros(2, (1 << 31) // 4096 // 2 + 8, 4096, dtype=torch.bfloat16, device=device)
    x[-1, -1] = torch.randn(4096, device=device)
    values, row_scale = op(x)
    want = op(x[-1, -1:].clone())
    assert torch.equal(values[-1, -1].float(), want[0][0].float()) and torch.equal(row_scale[-1, -1], want[1][0])
    assert not values[0, 0].float().any()
