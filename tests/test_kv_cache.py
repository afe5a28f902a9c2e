# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from specedit_kernels.engine.kv_cache import DTYPE, SCALES, KVCache, pack_, unpack_


def packed(x):
    kept, scale = torch.empty_like(x, dtype=DTYPE), torch.empty_like(x[..., :1], dtype=SCALES)
    pack_(kept, scale, x)
    y = torch.full_like(x, float("nan"))
    unpack_(y, kept, scale)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rounding(random, device, dtype, size):
    """e4m3: half a step of 2^-3 of each number, down to 2^-10 of the smallest step of what its row spans."""
    x = (random(2, 37, 3, 32, device=device) * size).to(dtype)
    x[0, :, 1] *= 1e-3  # a head far smaller than its neighbours
    x[1, 5] = 0
    y, x = packed(x).double(), x.double()
    smallest = x.abs().amax(-1, keepdim=True) / 448 * 2.0**-10
    about = torch.finfo(dtype)
    assert ((y - x).abs() <= x.abs() * (2.0**-4 + 2 * about.eps) + smallest + about.tiny).all()
    assert (y - x).norm() > 0.01 * x.norm() and not y[1, 5].any()


def test_a_rows_largest_number_stays_finite(device):
    x = torch.linspace(0.9, 1.1, 4096, device=device)[:, None].to(torch.bfloat16) * 3e37
    assert torch.allclose(packed(x), x, rtol=1e-2)


def test_what_is_stored_is_read_back_rounded_once(random):
    cache, pair = KVCache(packed=True), [random(1, 8, 2, 16, dtype=torch.bfloat16) for _ in range(2)]
    cache.pairs = [None, cache.pack(*pair)]
    for x, y in zip(pair, cache.unpack(cache.pairs[1], torch.bfloat16)):
        assert x.dtype == y.dtype and torch.equal(y, packed(x))
    assert cache.bytes == 2 * (8 * 2 * 16 + 8 * 2 * 4)
