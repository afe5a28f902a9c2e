# SPDX-License-Identifier: Apache-2.0
"""Attention of an autoencoder's wide heads against float64 on the rounded inputs."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.utils import logging

from specedit_kernels.engine import wide_attention


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 70, 70, 512), (2, 2, 33, 50, 384), (1, 1, 1, 1, 264)], ids=str)
def test_chunks_are_the_whole(monkeypatch, random, device, dtype, shape):
    batch, heads, queries, keys, dim = shape
    monkeypatch.setattr(wide_attention, "SCORES_BYTES", 4 * 16 * keys)  # chunks of 16 queries, the last one shorter
    q = random(batch, heads, queries, dim, dtype=dtype, device=device)
    k, v = (random(batch, heads, keys, dim, dtype=dtype, device=device) for _ in range(2))
    weights = (q.double() @ k.double().transpose(-1, -2) * dim**-0.5).softmax(-1)
    expected = weights @ v.double()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for found in (wide_attention.by_products(q, k, v), wide_attention.attend(q, k, v)):
        assert found.dtype == dtype and found.shape == expected.shape
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_what_it_serves(device):
    q = torch.zeros(1, 1, 4, 512, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        assert wide_attention.serves(q) == (device.type == "cuda")
        assert not wide_attention.serves(q[..., :256]) and not wide_attention.serves(q.float())
    assert not wide_attention.serves(q)  # autograd


@torch.no_grad()
def test_diffusers_knows_all_arguments_of_the_processor(caplog):
    """It would warn in each call of an autoencoder's middle block."""
    attn = Attention(16, heads=1, dim_head=16, norm_num_groups=4, residual_connection=True, bias=True)
    attn.processor = wide_attention.WideAttnProcessor()
    logger = logging.get_logger("diffusers.models.attention_processor")
    logger.addHandler(caplog.handler)
    attn(torch.zeros(1, 16, 2, 3), temb=None)
    logger.removeHandler(caplog.handler)
    assert not caplog.records
