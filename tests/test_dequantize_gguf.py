# SPDX-License-Identifier: Apache-2.0
"""Blocks of GGUF files, beside the gguf package's own numbers (fp32) and diffusers' (fp16, to the last bit)."""

import numpy as np
import pytest
import torch
from test_dequantize import BITS, assert_bits, rounded

from specedit_kernels._gguf import BLOCKS
from specedit_kernels.reference.dequantize_gguf import dequantize_gguf as definition

op = torch.ops.specedit.dequantize_gguf
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Where a block's fp16 numbers are, in halves of a word; of the others a block has one, in front.
HALVES = {"Q4_1": (0, 1), "Q5_1": (0, 1), "Q4_K": (0, 1), "Q5_K": (0, 1), "Q2_K": (40, 41), "Q3_K": (54,),
          "Q6_K": (104,)}  # fmt: skip


def blocks_of(kind, *shape, seed=0, device="cpu", scale=None):
    """Random blocks [*shape, bytes], the last of `shape` in blocks. Scales are normal, or `scale`'s."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (*shape[:-1], shape[-1] * BLOCKS[kind][1]), generator=generator, dtype=torch.uint8)
    halves = x.view(-1, BLOCKS[kind][1]).view(torch.float16)
    for i in HALVES.get(kind, (0,)):
        drawn = torch.randn(len(halves), generator=generator) * 0.01 if scale is None else scale[: len(halves)]
        halves[:, i] = drawn.half()
    return x.to(device)


def near(x, dtype, backend):
    """fp16 numbers as the kernel stores them in dtype."""
    return rounded(x.cpu().float(), dtype, backend)


@pytest.mark.parametrize("kind", BLOCKS)
def test_numbers_are_those_of_the_format(backend, poison, device, kind):
    """Within fp16's rounding of three products and sums, beside float64 of the gguf package's numbers."""
    gguf = pytest.importorskip("gguf")
    own = gguf.GGMLQuantizationType[kind]
    assert tuple(gguf.GGML_QUANT_SIZES[own]) == BLOCKS[kind]
    x = blocks_of(kind, 3, 5, device=device)
    exact = torch.from_numpy(gguf.quants.dequantize(x.cpu().numpy(), own).astype(np.float64))
    got = op(x, kind, torch.float16)
    assert got.shape == exact.shape == (3, 5 * BLOCKS[kind][0])
    # the numbers that are subtracted are no larger than the largest of a block
    largest = exact.abs().unflatten(1, (5, -1)).amax(-1, keepdim=True).expand(-1, -1, BLOCKS[kind][0]).flatten(1)
    assert ((got.cpu().double() - exact).abs() <= 3 * 2**-11 * largest).all()
    assert got.unique().numel() > 100


@pytest.mark.parametrize("kind", BLOCKS)
def test_numbers_have_diffusers_bits(backend, poison, device, kind):
    """Of ordinary blocks, of subnormal scales, of sums beyond fp16's range; and rounded from there to each dtype."""
    gguf, utils = pytest.importorskip("gguf"), pytest.importorskip("diffusers.quantizers.gguf.utils")
    edges = torch.tensor([0.0, -0.0, 6e-8, -3e-6, 65504, -1e3, float("inf"), float("nan")])
    for x in (blocks_of(kind, 2, 4, device=device, seed=1), blocks_of(kind, len(edges), 1, device=device, scale=edges)):
        parameter = utils.GGUFParameter(x, quant_type=gguf.GGMLQuantizationType[kind])
        own = utils.dequantize_gguf_tensor(parameter)
        assert own.dtype == torch.float16
        for dtype in DTYPES:
            assert_bits(op(x, kind, dtype), near(own, dtype, backend))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1,), (2, 3, 7)], ids=str)
@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K"])
def test_all_shapes(backend, poison, device, kind, shape):
    x = blocks_of(kind, *shape, device=device)
    got = op(x, kind, torch.bfloat16)
    assert got.shape == (*shape[:-1], shape[-1] * BLOCKS[kind][0])
    assert_bits(got, near(definition(x.cpu(), kind, torch.float16), torch.bfloat16, backend))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_a_part_of_a_tensor(backend, poison, device, kind):
    """Rows from the middle of others, and all at an odd address."""
    x = blocks_of(kind, 5, 3, device=device)
    expected = op(x, kind, torch.bfloat16)
    assert_bits(op(x[2:4], kind, torch.bfloat16), expected[2:4].contiguous())
    odd = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    assert odd.data_ptr() % 2
    assert_bits(op(odd, kind, torch.bfloat16), expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_are_64_bits():
    x = torch.zeros(70001, 960 * 34, dtype=torch.uint8, device="cuda")
    x[-1].view(torch.float16)[0], x[-1, 2] = 1.0, 3
    got = op(x, "Q8_0", torch.bfloat16)
    assert got[-1, 0] == 3 and got[-1].sum() == 3 and (got[-2] == 0).all()


@pytest.mark.gpu
def test_it_is_captured():
    x = blocks_of("Q4_K", 3, 5, device="cuda")
    op(x, "Q4_K", torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(x, "Q4_K", torch.bfloat16)
    x.copy_(blocks_of("Q4_K", 3, 5, seed=7))
    graph.replay()
    assert torch.equal(y.view(BITS[2]), op(x, "Q4_K", torch.bfloat16).view(BITS[2]))


TWO = torch.zeros(3, 68, dtype=torch.uint8)


@pytest.mark.parametrize(
    "x, kind, dtype, error, words",
    [
        (TWO.char(), "Q8_0", torch.bfloat16, TypeError, "blocks: expected dtype uint8, got int8"),
        (TWO, "IQ4_NL", torch.bfloat16, ValueError, "kind: expected one of Q4_0, .*, Q6_K, got 'IQ4_NL'"),
        (TWO[:, :67], "Q8_0", torch.bfloat16, ValueError,
         r"blocks: expected whole blocks of 34 bytes in the last dimension, got \[3, 67\]"),
        (TWO[:, :34], "Q8_0", torch.bfloat16, ValueError, "blocks: expected a contiguous tensor, got strides"),
        (TWO, "Q8_0", torch.float64, TypeError, "dtype: expected bfloat16, float16 or float32, got float64"),
    ],
)  # fmt: skip
def test_bad_input(x, kind, dtype, error, words):
    with pytest.raises(error, match=words):
        op(x, kind, dtype)
