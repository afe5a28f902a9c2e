# SPDX-License-Identifier: Apache-2.0
"""An autoencoder on several ranks: what one rank computes, for any height; what is unknown runs whole."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage
from ranks import CPU_ONLY, on_ranks
from test_models_fibo import tiny_fibo

from specedit_kernels.engine import strips
from specedit_kernels.engine.parallel import Ranks, beyond
from specedit_kernels.engine.registry import codec_of

pytestmark = CPU_ONLY

SIZES = dict(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
MAKE = {
    "kontext": lambda: AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.36, shift_factor=0.12, **SIZES,
    ),
    "flux2": lambda: AutoencoderKLFlux2(**SIZES),
    "qwen": lambda: AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1),
}  # fmt: skip


def autoencoder(name):
    torch.manual_seed(0)
    return MAKE[name]().eval().requires_grad_(False)


def codecs(name, fused):
    codec = codec_of(autoencoder(name))
    return codec.fused() if fused else codec


def pictures(rows, unit, batch=2):
    return torch.randn(batch, 3, rows * unit, 6 * unit, generator=torch.Generator().manual_seed(rows))


def _unit(codec):
    return codec.token // 2


def _coded(name, fused, heights, layout):
    """[(latents, pixels, rows of all ranks in the encoder and the decoder)] of each height in rows of latents."""
    codec = codecs(name, fused)
    shared, found = strips.over(codec, Ranks.of(None)), []
    assert type(shared) is type(codec) and shared is not codec
    parts = [shared.vae.encoder.strips, shared.vae.decoder.strips]
    with torch.no_grad():
        for rows in heights:
            for part in parts:
                part.rows = []
            latents = shared.encode(pictures(rows, _unit(codec)).contiguous(memory_format=layout))
            pixels = shared.decode(latents)
            found.append((latents, pixels, [part.rows for part in parts]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name, size, heights", [
    ("kontext", 2, (1, 2, 6, 7)), ("kontext", 4, (4, 9)), ("flux2", 2, (4,)), ("qwen", 2, (3, 8)), ("qwen", 4, (6,)),
])  # fmt: skip
def test_strips_give_what_one_rank_computes(tmp_path, one_thread, name, size, heights, fused):
    if name == "flux2":
        heights = [2 * rows for rows in heights]  # its latents are packed
    codec = codecs(name, fused)
    for layout in (torch.contiguous_format, torch.channels_last) if name == "kontext" else (torch.contiguous_format,):
        with torch.no_grad():
            sources = [codec.encode(pictures(rows, _unit(codec))) for rows in heights]
            expected = [(x, codec.decode(x)) for x in sources]
        ranks = on_ranks(size, tmp_path, _coded, name, fused, heights, layout)
        for found in ranks:
            for rows, (latents, pixels, computed), (want, seen) in zip(heights, found, expected):
                torch.testing.assert_close(latents, want, rtol=0, atol=2e-5)
                torch.testing.assert_close(pixels, seen, rtol=0, atol=5e-5)
                split = Ranks(None, 0, size).split(rows) if rows >= size else []
                assert computed == [split, split], rows
                assert torch.equal(latents, ranks[0][heights.index(rows)][0])  # the same bits on every rank


def _beyond(rows):
    ranks = Ranks.of(None)
    whole = torch.randn(2, 3, sum(rows), 4, generator=torch.Generator().manual_seed(0))
    first = sum(rows[: ranks.rank])
    for above, below in ((1, 1), (0, 1), (1, 0), (0, 0)):
        expected = torch.nn.functional.pad(whole, (0, 0, above, below))
        expected = expected[:, :, first : first + above + rows[ranks.rank] + below]
        for layout in (torch.contiguous_format, torch.channels_last):
            own = whole[:, :, first : first + rows[ranks.rank]].contiguous(memory_format=layout)
            found = beyond(own, above, below, ranks)
            assert torch.equal(found, expected) and found.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("rows", [[3, 2], [1, 1]])
def test_rows_beyond_a_strip(tmp_path, rows):
    on_ranks(2, tmp_path, _beyond, rows)


@pytest.mark.slow
def test_rows_beyond_a_strip_of_four(tmp_path):
    on_ranks(4, tmp_path, _beyond, [2, 1, 1, 1])


def _tiled():
    codec = codecs("kontext", True)
    codec.vae.enable_tiling()
    codec.vae.tile_sample_min_size, codec.vae.tile_latent_min_size = 32, 4
    x = pictures(7, _unit(codec), 1)
    with torch.no_grad():
        whole = codec.encode(x)
        shared = strips.over(codec, Ranks.of(None))
        return [(shared.encode(x), whole), (shared.decode(whole), codec.decode(whole))]


@pytest.mark.slow
def test_each_tile_is_shared_out(tmp_path, one_thread):
    for pairs in on_ranks(2, tmp_path, _tiled):
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


class _OtherConv(torch.nn.Conv2d):
    pass


def _other_conv(vae):
    vae.decoder.conv_out.__class__ = _OtherConv


def _own_forward(vae):
    forward = vae.decoder.mid_block.forward
    vae.decoder.mid_block.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def _hook(vae):
    vae.decoder.conv_in.register_forward_hook(lambda *args: None)


def _reflects(vae):
    vae.decoder.conv_in.padding_mode = "reflect"


def _other_processor(vae):
    vae.decoder.mid_block.attentions[0].processor = object()


@pytest.mark.parametrize("change", [_other_conv, _own_forward, _hook, _reflects, _other_processor])
def test_a_part_with_something_else_in_it_runs_whole(change):
    vae = autoencoder("kontext")
    change(vae)
    for codec in (codec_of(vae), codec_of(vae).fused()):
        shared = strips.over(codec, Ranks(None, 0, 2))
        assert shared.vae.decoder is codec.vae.decoder
        assert type(shared.vae.encoder) is strips._Shared and shared.vae.encoder.whole is codec.vae.encoder
    assert vae.encoder is not shared.vae.encoder  # the user's own stays


def test_one_rank_and_other_codecs_are_left_alone():
    codec = codec_of(autoencoder("kontext"))
    assert strips.over(codec, None) is codec and strips.over(codec, Ranks(None, 0, 1)) is codec
    fibo = codec_of(tiny_fibo().vae)
    shared = strips.over(fibo, Ranks(None, 0, 2))
    assert (shared.vae.encoder, shared.vae.decoder) == (fibo.vae.encoder, fibo.vae.decoder)
    assert strips.over(object, Ranks(None, 0, 2)) is object
