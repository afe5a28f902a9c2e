# SPDX-License-Identifier: Apache-2.0
"""detail="native": windows that hold the region, a second pass over them, and nothing else of the source touched."""

import math

import numpy as np
import PIL.Image
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from test_source_size import OPTIONS, check, noise, places, run
from tiny_models import TINY, tiny_image, tiny_pipeline

from specedit_kernels import SpecEditConfig, SpecEditFluxKontextPipeline, edit_image
from specedit_kernels.engine import native
from specedit_kernels.engine.enable import enable_specedit
from specedit_kernels.images.composite import composite, composite_window, edit_weight
from specedit_kernels.images.windows import Window, windows

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = 32


@pytest.fixture(scope="module")
def pipe():
    made = SpecEditFluxKontextPipeline.from_pipe(tiny_pipeline())
    made.set_progress_bar_config(disable=True)
    return made


def regions():
    rng = np.random.default_rng(0)
    corner, apart, ring = (np.zeros((12, 16), bool) for _ in range(3))
    corner[0, 0] = True
    apart[0:2, 0:3] = apart[10:, 14:] = True
    ring[2:10, 3:13] = True
    ring[4:8, 5:11] = False
    return {"corner": corner, "apart": apart, "ring": ring, "all": ~np.zeros((12, 16), bool),
            "scattered": rng.random((12, 16)) < 0.1}  # fmt: skip


# windows


@pytest.mark.parametrize("name", regions())
@pytest.mark.parametrize("picture", [(256, 192), (512, 384), (777, 601), (1024, 768), (5000, 3750)], ids=str)
def test_windows_hold_the_region(name, picture):
    region, working = regions()[name], (256, 192)
    found = windows(region, picture, working, BLOCK, 8)
    longest = math.isqrt(working[0] * working[1]) // BLOCK * BLOCK
    covered = np.zeros(picture[::-1], np.float32)
    for window in found:
        top, bottom, left, right = window.box
        assert 0 <= top < bottom <= picture[1] and 0 <= left < right <= picture[0]
        assert all(side % BLOCK == 0 and BLOCK <= side <= longest for side in window.size)
        # one pixel of the pass for one of the picture, or for LARGEST_SCALE of the working size
        scale = math.sqrt(math.prod(picture) / math.prod(working))
        expected = max(scale / 4, 1.0)
        for side, at in zip(window.size, ((bottom - top), (right - left))):
            assert abs(at / side - expected) <= expected * BLOCK / side / 2 + 1e-6
        weight = window.weight()
        tokens = window.tokens(region, picture, 16)
        assert tokens.shape == (window.size[0] // 16, window.size[1] // 16) and tokens.any()
        assert weight.shape == (bottom - top, right - left) and weight.max() == 1
        part = covered[top:bottom, left:right]
        part[...] = np.maximum(part, weight)
    y, x = (np.arange(n) * c // n for n, c in zip(picture[::-1], region.shape))
    # every pixel of the region is some window's alone, at last
    assert (covered[region[y[:, None], x]] > 0.98).all()
    # of small parts apart each has its own
    if name == "apart" and picture[0] >= 1024:
        assert len(found) >= 2 and sum(math.prod(w.size) for w in found) < math.prod(picture) / 2


def test_tokens_are_those_that_touch_the_region_in_the_core():
    region = np.zeros((6, 8), bool)
    region[2, 3] = True  # pixels 64 to 95 down, 96 to 127 across of 192 x 256
    window = Window((32, 160, 64, 192), (32, 160, 64, 192), (128, 128))
    tokens = window.tokens(region, (256, 192), 16)
    assert np.argwhere(tokens).tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]
    cut = Window((32, 160, 64, 192), (32, 80, 64, 100), (128, 128))
    assert np.argwhere(cut.tokens(region, (256, 192), 16)).tolist() == [[2, 2]]
    # a pass at half the picture's resolution
    half = Window((0, 192, 0, 256), (0, 192, 0, 256), (96, 128))
    assert np.argwhere(half.tokens(region, (256, 192), 16)).tolist() == [[2, 3]]
    fading = Window((0, 64, 0, 64), (16, 48, 8, 64), (64, 64), (4, 0)).weight()
    assert fading[15, 8] == 0 and fading[16, 8] == 0.125 and fading[20, 8] == 1
    assert fading[30, 7] == 0 and fading[47, 63] == 1


def test_cost_follows_the_region():
    """Twice the region, twice the windows' pixels; a larger picture with as many pixels edited, no more of them."""

    def area(picture, sides):
        region = np.zeros((64, 64), bool)
        region[: sides[0], : sides[1]] = True
        return sum(math.prod(w.size) for w in windows(region, picture, (1024, 1024), BLOCK))

    small, large = area((4096, 4096), (16, 16)), area((4096, 4096), (32, 32))
    assert 2.5 < large / small < 5
    assert area((4096, 4096), (16, 16)) == area((2048, 2048), (32, 32))


# compositing


@pytest.mark.parametrize("shape", [(96, 128), (96, 128, 2), (96, 128, 3), (96, 128, 4)], ids=str)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32], ids=lambda k: np.dtype(k).name)
@pytest.mark.parametrize("feather", [0, 8])
def test_a_window_is_put_in_as_the_whole_is(shape, kind, feather):
    source = noise(shape, kind)
    region = np.zeros((3, 4), bool)
    region[1, 1:3] = True
    edited = np.full((96, 128, 3), 0.25, np.float32)
    weight = edit_weight(region, (64, 48), feather)
    box = (8, 88, 16, 116)
    part = composite_window(source, edited[8:88, 16:116], weight, feather, box)
    assert part.dtype == source.dtype and part.shape == source[8:88, 16:116].shape
    whole = composite(source, np.full((48, 64, 3), 0.25, np.float32), region, feather, match=False)
    inside = weight.numpy().repeat(2, 0).repeat(2, 1)[8:88, 16:116] > 0
    old = source[8:88, 16:116]
    near = np.pad(inside, 2)
    near = np.lib.stride_tricks.sliding_window_view(near, (5, 5)).any((-1, -2))
    assert np.array_equal(part[~near], old[~near])
    deep = weight.numpy().repeat(2, 0).repeat(2, 1)[8:88, 16:116] == 1
    top = np.iinfo(kind).max if np.dtype(kind).kind == "u" else 1
    colours = slice(None) if len(shape) == 2 else slice(0, shape[2] - (shape[2] in (2, 4)))
    if len(shape) == 3 and shape[2] in (2, 4):
        assert np.array_equal(part[..., -1], old[..., -1])
        part, whole = part[..., colours], whole[..., colours]
    off = np.abs(part[deep].astype(float) - whole[8:88, 16:116][deep].astype(float)) / top
    assert off.max() <= 0.13  # what is added for the seam, at most


# the pass


@pytest.mark.slow
@pytest.mark.parametrize("finish", ["full", "locked"])
@pytest.mark.parametrize(
    "kind, shape",
    [(np.uint8, (300, 420, 3)), (np.uint8, (300, 420)), (np.uint16, (300, 420, 4)), (np.float32, (420, 300, 2))],
    ids=str,
)
def test_outside_the_region_the_sources_bits_stay(pipe, kind, shape, finish):
    source = noise(shape, kind)
    before = source.copy()
    options = dict(region=("30%", "20%", "60%", "50%"), specedit=SpecEditConfig(finish=finish))
    out = run(pipe, source, detail="native", **options)
    assert np.array_equal(source, before)
    assert check(out.images[0], source, out.mask[0]).mean() > 0.3
    [found] = out.stats.native
    assert found.windows and found.steps >= 2 and not found.reason and found.sigma == native.SIGMA
    assert sum(step.stage == "native" for step in out.stats.steps) >= found.steps * len(found.windows)
    assert "native" in out.stats.seconds and out.stats.nfe == 4
    base = run(pipe, source, **options)
    assert base.stats.native == [] and torch.equal(base.mask, out.mask)
    inside, _ = places(out.mask[0].numpy(), shape)
    assert (base.images[0] != out.images[0])[inside].mean() > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("region", [(0, 0, 30, 30), (390, 270, 420, 300), (0, 299, 420, 300), (17, 17, 18, 18),
                                    "0,0,100%,100%"], ids=str)  # fmt: skip
def test_regions_at_the_edge_of_one_pixel_and_whole(pipe, region):
    source = noise((300, 420, 3), np.uint8)
    out = run(pipe, source, region=region, detail="native")
    check(out.images[0], source, out.mask[0])
    assert out.stats.native[0].windows


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (128, 128), (150, 120), (96, 64)], ids=str)
def test_a_picture_that_is_hardly_larger_than_the_working_size_is_as_without(pipe, size):
    source = noise((*size, 3), np.uint8)
    base, found = (run(pipe, source, region="0,0,50%,50%", detail=d) for d in ("working", "native"))
    assert np.array_equal(base.images[0], found.images[0])
    assert not found.stats.native[0].windows and "pixels a side" in str(found.stats.native[0])


@pytest.mark.slow
@pytest.mark.parametrize("size", [(37, 2000), (2000, 37)], ids=str)
def test_strips(pipe, size):
    source = noise((*size, 3), np.uint8)
    out = run(pipe, source, region="0,0,20%,100%", detail="native")
    check(out.images[0], source, out.mask[0])


def test_nothing_edited_and_previews_have_no_pass(pipe):
    source = noise((300, 420, 3), np.uint8)
    nothing = run(pipe, source, detail="native", specedit=SpecEditConfig(threshold=4.0))
    preview = run(pipe, source, detail="native", preview=True, region=(0, 0, 9, 9))
    for out in (nothing, preview):
        assert np.array_equal(out.images[0], source) and out.stats.native == [None] and "native" not in {
            step.stage for step in out.stats.steps}  # fmt: skip


@pytest.mark.slow
def test_a_sample_of_a_batch_is_as_it_is_alone(pipe):
    sources = [noise((300, 420, 3), np.uint8), noise((400, 260, 3), np.uint8, seed=1)]
    prompts = ["add a hat", "make the cat blue"]
    options = dict(OPTIONS, region="0,0,40%,40%", detail="native", output_size="source", true_cfg_scale=2.0,
                   height=128, width=128)  # fmt: skip

    def generator():
        return [torch.Generator().manual_seed(i) for i in (3, 4)]

    both = pipe(sources, prompts, generator=generator(), negative_prompt=["red", "grey"], **options)
    for i in (0, 1):
        negative = ["red", "grey"][i]
        alone = pipe(sources[i], prompts[i], generator=[generator()[i]], negative_prompt=negative, **options)
        check(both.images[i], sources[i], both.mask[i])
        off = np.abs(both.images[i].astype(int) - alone.images[0])
        # the first results are apart by one level in a few pixels, of which random weights make more
        assert off.max() <= 16 and off.mean() < 0.1
    assert len(both.stats.native) == 2 and both.stats.native[0].scale != both.stats.native[1].scale


@pytest.mark.slow
def test_the_first_result_is_what_the_pass_begins_from(pipe, monkeypatch):
    """At a sigma of nearly nothing the pass gives the first result, through the autoencoder, at a high one another."""
    source, options, seen = np.asarray(tiny_image(300, 420)), dict(region="0,0,5%,5%"), []
    real = native._denoise

    def spy(run_, index, first, window, *rest):
        found = real(run_, index, first, window, *rest)
        through = run_.model.decode(run_.model.encode(first)) / 2 + 0.5
        seen.append((first, window, found, through[0].clamp(0, 1).permute(1, 2, 0).numpy()))
        return found

    monkeypatch.setattr(native, "_denoise", spy)
    for kv_refresh in (1, 3, "bracket"):
        config = SpecEditConfig(finish="locked", kv_refresh=kv_refresh)
        off = []
        for sigma in (1e-5, 0.9):
            monkeypatch.setattr(native, "SIGMA", sigma)
            seen.clear()
            run(pipe, source, detail="native", specedit=config, **options)
            off.append(max(np.abs(found - through).max() for _, _, found, through in seen))
        assert off[0] < 0.01 < 0.02 < off[1]
        # what the pass is given outside the region is the source's own window
        equal = [float((first == window).all(dim=1).float().mean()) for first, window, _, _ in seen]
        assert all(share < 0.95 for share in equal) and max(equal) > 0.05


def test_the_text_is_locked_where_that_is_asked_for(pipe):
    """Not where the whole edit has it between two passes: here there is one."""

    def locked(**config):
        options = dict(region="0,0,5%,5%", specedit=SpecEditConfig(finish="locked", **config))
        steps = run(pipe, np.asarray(tiny_image(300, 420)), detail="native", **options).stats.steps
        native = [step.stage == "native" for step in steps]
        return tuple(any(s.lock_text for s, x in zip(steps, native) if x == of) for of in (False, True))

    assert locked() == (True, False)
    assert locked(lock_text=True, kv_refresh=3) == (True, True)


def test_an_interrupted_pass_leaves_the_first_result(pipe):
    source = noise((300, 420, 3), np.uint8)
    base = run(pipe, source, region="0,0,40%,40%")

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 3
        return {}

    out = run(pipe, source, region="0,0,40%,40%", detail="native", callback_on_step_end=stop)
    assert np.array_equal(out.images[0], base.images[0]) and "interrupted" in str(out.stats.native[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_every_model(name, guided, monkeypatch):
    made, call = TINY[name](monkeypatch)
    pipe = enable_specedit(made).pipe
    options = call(guided)
    pictures = options.pop("image")
    first = PIL.Image.fromarray(noise((256, 256, 3), np.uint8))
    options["image"] = [first, *pictures[1:]] if isinstance(pictures, list) else first
    options |= dict(output_type="np", output_size="source", detail="native", num_inference_steps=4)
    options |= dict(generator=torch.Generator().manual_seed(0), region=(0, 0, 90, 90))
    out = pipe(**options)
    found = out.images[0]
    check(found, np.asarray(first), out.mask[0])
    assert out.stats.native[0].windows and np.isfinite(out.stats.flops)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FluxKontextPipeline", "QwenImageEditPipeline"])
def test_the_fused_runner_gives_the_same(name, monkeypatch):
    made, call = TINY[name](monkeypatch)
    pipe, options = enable_specedit(made).pipe, call(False)
    source = noise((256, 256, 3), np.uint8)
    options |= dict(image=PIL.Image.fromarray(source), output_type="np", output_size="source", detail="native",
                    num_inference_steps=4, region=(20, 20, 120, 60))  # fmt: skip
    images = []
    for runner in ("eager", "fused"):
        config = SpecEditConfig(runner=runner)
        out = pipe(specedit=config, generator=torch.Generator().manual_seed(0), **options)
        assert out.stats.runner == runner and out.stats.native[0].windows
        check(out.images[0], source, out.mask[0])
        images.append(out.images[0])
    off = np.abs(images[0].astype(int) - images[1])
    assert off.max() <= 3 and off.mean() < 0.01


def test_sigmas():
    assert native.native_sigmas([1.0, 0.8, 0.59, 0.5, 0.2, 0.0], 0.6) == [0.6, 0.5, 0.2, 0.0]
    assert native.native_sigmas([1.0, 0.0], 0.6) == [0.6, 0.0]


@pytest.mark.slow
def test_edit_image_and_the_summary(pipe):
    source = noise((300, 420, 3), np.uint8)
    result = edit_image(source, "add a hat", model=pipe, region="0,0,40%,40%", detail="native", max_area=128 * 128,
                        _auto_resize=False, max_sequence_length=16, num_inference_steps=4)  # fmt: skip
    check(result.picture, source, result.mask)
    text = str(result.stats.native[0])
    assert text.startswith(f"{len(result.stats.native[0].windows)} of ") and "steps from sigma 0.6" in text


@pytest.mark.parametrize("options, words", [
    (dict(detail="fine"), "detail: expected one of"),
    (dict(detail="native", output_size="working"), "detail: expected 'working' without output_size='source'"),
], ids=str)  # fmt: skip
def test_what_cannot_be(pipe, options, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        run(pipe, tiny_image(128, 160), **options)


def test_methods_and_models_that_have_none():
    from specedit_kernels.flash_edit import flash_pipelines

    assert all(kind.DETAILS == ("working",) for kind in flash_pipelines().values())
    assert SpecEditFluxKontextPipeline.DETAILS == ("working", "native")
