# SPDX-License-Identifier: Apache-2.0
"""What autoencoders do to maps between convolutions: PyTorch's bits, in fewer launches."""

import pytest
import torch
import torch.nn.functional as F

from specedit_kernels.engine import feature_maps

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (1, 3, 4, 6), (1, 6, 1, 3), (2, 16, 3, 1)], ids=str)
def test_doubled_and_padded_are_torchs_bits(random, device, shape, layout, dtype):
    whole = random(shape[0] + 1, *shape[1:], dtype=dtype, device=device).contiguous(memory_format=layout)
    for x in (whole[1:], whole):
        for found, expected in (
            (feature_maps.doubled(x), F.interpolate(x, scale_factor=2.0, mode="nearest")),
            (feature_maps.padded_behind(x), F.pad(x, (0, 1, 0, 1))),
            (feature_maps.padded_behind(x, 0), F.pad(x, (0, 1, 0, 0))),
        ):
            assert torch.equal(found, expected) and found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("layouts", [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
def test_a_residual_of_another_layout_or_dtype(random, device, layouts, dtypes):
    formats = (torch.contiguous_format, torch.channels_last)
    x, residual = (
        random(2, 6, 4, 5, dtype=dtype, device=device).contiguous(memory_format=formats[layout])
        for layout, dtype in zip(layouts, dtypes)
    )
    bias, before = random(6, device=device), residual.clone()
    expected = x.double() + bias.double()[:, None, None] + residual.double()
    found = feature_maps.residual_sum(x, bias, residual)
    assert found.dtype == torch.promote_types(*dtypes) and torch.equal(residual, before)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
