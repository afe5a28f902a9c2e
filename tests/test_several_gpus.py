# SPDX-License-Identifier: Apache-2.0
"""One edit on several ranks: the picture of one process, the keys and values of own heads alone, clear errors."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from ranks import CPU_ONLY, on_ranks, share_sequence
from tiny_models import call_options, paper, qwen_text, tiny_image, tiny_pipeline, tiny_qwen

from specedit_kernels import (
    disable_guidance_parallelism,
    disable_specedit,
    enable_guidance_parallelism,
    enable_specedit,
)
from specedit_kernels.engine.parallel import Ranks, all_tokens, to_heads, to_tokens

pytestmark = CPU_ONLY


def box(side=128, low=32, high=64):
    mask = torch.zeros(side, side)
    mask[low:high, low:high] = 1
    return mask


CACHED = dict(finish="locked", kv_refresh=9)
KINDS = {
    "full": {}, "locked": dict(finish="locked"), "cached": CACHED, "locked text": CACHED | dict(lock_text=True),
    "bracket": dict(finish="locked", kv_refresh="bracket"), "fp8 cache": CACHED | dict(kv_cache_dtype="fp8"),
}  # fmt: skip


def flux(heads=2):
    pipe = tiny_pipeline()
    if heads != 2:
        config = dict(pipe.transformer.config) | dict(num_attention_heads=heads)
        torch.manual_seed(5)
        pipe.transformer = FluxTransformer2DModel.from_config(config).eval()
    return pipe, lambda: call_options(image=tiny_image(), height=128, width=128)


def qwen(text=12, guided=False, plus=False):
    pipe = tiny_qwen(plus, zero_cond_t=plus)

    def call():
        options = dict(qwen_text(text), image=tiny_image(), height=128, width=128, max_area=128 * 128)
        if guided:
            options |= dict(qwen_text(7, negative=True, seed=4), true_cfg_scale=3.0)
        return options | dict(output_type="latent")

    return pipe, call


def edited(pipe, call, mask, seed=7, **options):
    """(latents, bytes of kept keys and values, selected tokens, runner)."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    found = pipe(specedit=paper(**options), mask_image=mask, generator=generator, **call())
    return found.images, found.stats.kv_cache_bytes, found.mask, found.stats.runner


def edits(make, kinds, size=None, masked=True, hooks=None, seed=7):
    """{(kind, runner): what `edited` gives}, on the ranks of the group where `size` is given."""
    pipe, call = make()
    if size:
        share_sequence(pipe.transformer, size, **hooks or {})
    enable_specedit(pipe)
    mask = box() if masked else None
    return {
        (kind, runner): edited(pipe, call, mask, seed, runner=runner, **KINDS[kind])
        for kind in kinds
        for runner in ("eager", "fused")
    }


def same(found, expected, tolerance=2e-5):
    for key, (images, _, mask, runner) in expected.items():
        assert found[key][3] == runner == key[1], key
        assert torch.equal(found[key][2], mask), key
        torch.testing.assert_close(found[key][0], images, rtol=0, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


def test_the_parts_of_a_sequence():
    ranks = Ranks(None, 1, 4)
    assert ranks.split(10) == [len(x) for x in torch.arange(10).tensor_split(4)] == [3, 3, 2, 2]
    assert ranks.bounds(10) == (3, 6)


def _exchanged(sizes, batch):
    ranks, heads, dim = Ranks.of(None), 4, 3
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(batch, sum(sizes), heads, dim, generator=generator).double() for _ in range(3)]
    first = sum(sizes[: ranks.rank])
    mine = [x[:, first : first + sizes[ranks.rank]] for x in whole]
    own = heads // ranks.size
    for streams in ([mine], [[x[:, :1] for x in mine], [x[:, 1:].float() for x in mine]]):
        found = to_heads([[x.float() for x in s] for s in streams], sizes, ranks)
        for x, y in zip(found, whole):
            assert torch.equal(x, y[:, :, ranks.rank * own : (ranks.rank + 1) * own].float())
    assert torch.equal(to_tokens(found[0], sizes, ranks), mine[0].float().flatten(2))
    assert torch.equal(all_tokens(mine[1][:, :, 0], sizes, ranks), whole[1][:, :, 0])


@pytest.mark.parametrize("sizes", [[3, 3], [4, 3]])
def test_tokens_to_heads_and_back(tmp_path, sizes):
    on_ranks(2, tmp_path, _exchanged, sizes, 2)


@pytest.mark.parametrize("make, kinds", [(flux, tuple(KINDS)), (qwen, ("full", "cached", "locked text"))])
def test_two_ranks_give_the_picture_of_one(tmp_path, one_thread, make, kinds):
    expected = edits(make, kinds)
    for found in on_ranks(2, tmp_path, edits, make, kinds, 2):
        same(found, expected)
        for key, (_, kept, *_) in found.items():
            assert kept == expected[key][1] // 2, key  # each has its heads' alone
