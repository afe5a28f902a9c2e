# SPDX-License-Identifier: Apache-2.0
"""An edit put into its source: outside the feathered region the source's bits, inside it the edit."""

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from specedit_kernels.images import resample as resampling
from specedit_kernels.images.composite import _grown, composite, composite_window, edit_weight
from specedit_kernels.images.resample import as_pillow, resample, resized_levels

MODES = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "one channel": (1,)}


def a_source(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return (rng.random(shape, np.float32) * 1.2 - 0.1).astype(dtype)  # beyond [0, 1] is allowed, and kept
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def an_edit(h, w, seed=1):
    return np.random.default_rng(seed).random((h, w, 3), np.float32)


def touched(region, size, working, feather):
    """bool [H, W]: where the source's size may change, by distances from the region at the working size."""
    (width, height), (w, h) = size, working
    y = (np.arange(height) + 0.5) * h / height
    x = (np.arange(width) + 0.5) * w / width
    cells = region[(y * region.shape[0] / h).astype(int)][:, (x * region.shape[1] / w).astype(int)]
    # the working size's pixels in the region, all within the feather and a pixel of bilinear reach
    ry, rx = np.nonzero(edit_weight(region, working, 0).numpy() > 0)
    reach = feather + 1
    near = np.zeros((height, width), bool)
    for a, b in set(zip(ry.tolist(), rx.tolist())):
        near |= (np.abs(y - a - 0.5) <= reach)[:, None] & (np.abs(x - b - 0.5) <= reach)
    return cells, near


@pytest.mark.parametrize("feather", [0, 1, 2, 8])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("mode", MODES)
def test_outside_are_the_sources_bits_and_inside_the_edit(mode, dtype, feather):
    source, edited = a_source((90, 131, *MODES[mode]), dtype), an_edit(48, 64)
    region = np.zeros((3, 4), bool)
    region[1, 2] = True
    before = source.copy()
    out = composite(source, edited, region, feather)
    assert out.dtype == source.dtype and out.shape == source.shape and np.array_equal(source, before)
    inside, near = touched(region, (131, 90), (64, 48), feather)
    assert np.array_equal(out[~near], source[~near])
    assert np.array_equal(out[..., -1], source[..., -1]) or mode not in ("LA", "RGBA")
    colours = out if mode in ("L", "RGB", "one channel") else out[..., :-1]
    kept = source if mode in ("L", "RGB", "one channel") else source[..., :-1]
    changed = (colours != kept).reshape(90, 131, -1).any(axis=-1)
    assert changed[inside].mean() > 0.95
    assert np.isfinite(out).all()
    if feather < 2:
        assert not changed[~inside].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (37, 2000), (16, 16), (513, 129)])
@pytest.mark.parametrize("feather", [0, 8, 40])
def test_odd_sizes(size, feather):
    source, edited = a_source((size[1], size[0], 3), np.uint8), an_edit(32, 48)
    corners = np.array([[True, False, False], [False, False, True]])
    for region in (np.zeros((2, 3), bool), np.ones((2, 3), bool), corners):
        out = composite(source, edited, region, feather)
        assert out.shape == source.shape
        if region.all():
            assert (out != source).any(axis=-1).mean() > 0.95
        if not region.any():
            assert np.array_equal(out, source)


def test_the_edit_at_its_own_size_comes_through_exactly():
    source, edited = a_source((32, 48, 3), np.uint8), an_edit(32, 48)
    out = composite(source, edited, np.ones((2, 3), bool), 8)
    assert np.array_equal(out, np.rint(edited * 255).astype(np.uint8))


def test_tiles_leave_no_seam(monkeypatch):
    from specedit_kernels.images import composite as module

    source, edited = a_source((200, 300, 3), np.uint16), an_edit(40, 60)
    region = np.random.default_rng(3).random((10, 15)) < 0.3
    whole = composite(source, edited, region, 6)
    monkeypatch.setattr(module, "TILE", 37)
    parts = composite(source, edited, region, 6)
    assert np.abs(whole.astype(int) - parts).max() <= 1  # sums of another order
    assert np.array_equal(whole == source, parts == source)


def test_the_weight_is_the_pipelines_seam():
    region = np.zeros((6, 6), bool)
    region[2:4, 3] = True
    weight = edit_weight(region, (96, 96), 8)
    assert (weight[32:64, 48:64] == 1).all()
    line = weight[40]
    assert (line[:40] == 0).all() and (line[72:] == 0).all()
    np.testing.assert_allclose(line[40:48].numpy(), np.arange(1, 9) / 9, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_puts_in_what_the_cpu_does(mode, dtype):
    source, edited = a_source((390, 517, *MODES[mode]), dtype), an_edit(128, 176)
    region = np.random.default_rng(4).random((8, 11)) < 0.3
    for feather in (0, 8):
        here, there = (composite(source, edited, region, feather, device=device) for device in ("cpu", "cuda"))
        black, white = np.zeros((390, 517), np.float32), np.ones_like(edited)
        kept = composite(black, white, region, feather, match=False) == 0
        assert kept.mean() > 0.2 and np.array_equal(there[kept], source[kept])
        off = np.abs(here.astype(np.float64) - there.astype(np.float64)).max()
        assert off <= (1 if np.dtype(dtype).kind == "u" else 2e-3 if dtype == np.float16 else 1e-5)
        weights = (edit_weight(region, (176, 128), feather, device) for device in ("cpu", "cuda"))
        parts = [composite_window(source, edited, weight, feather, (16, 300, 33, 500)) for weight in weights]
        off = np.abs(parts[0].astype(np.float64) - parts[1].astype(np.float64)).max()
        assert off <= (1 if np.dtype(dtype).kind == "u" else 2e-3 if dtype == np.float16 else 1e-5)


def test_a_soft_mask_blends():
    source = np.zeros((64, 64, 3), np.uint8)
    mask = np.full((32, 32), 0.25, np.float32)
    out = composite(source, np.ones((32, 32, 3), np.float32), mask, 0, match=False)
    assert (np.abs(out.astype(int) - 64) <= 1).all()


def test_an_offset_at_the_seam_is_taken_away():
    y, x = np.mgrid[:256, :256] / 256
    source = np.stack([0.3 + 0.4 * x, 0.6 - 0.3 * y, 0.5 + 0.1 * x * y], -1).astype(np.float32)
    edited = source[::2, ::2] * np.float32(0.97) + np.float32(0.02)  # an autoencoder's cast
    region = np.zeros((8, 8), bool)
    region[2:6, 3:7] = True
    right = composite(source, source[::2, ::2], region, 8, match=False)
    off = {match: np.abs(composite(source, edited, region, 8, match=match) - right).mean() for match in (False, True)}
    assert off[True] < 0.3 * off[False]


def test_a_large_change_at_the_seam_stays():
    source = np.full((128, 128, 3), 200, np.uint8)
    edited = np.full((128, 128, 3), 0.2, np.float32)
    region = np.zeros((8, 8), bool)
    region[3:5, 3:5] = True
    assert (composite(source, edited, region, 8)[48:80, 48:80] == 51).all()


@pytest.mark.slow
def test_a_large_picture_stays_within_its_memory():
    import resource

    source = np.zeros((6000, 8000, 3), np.uint8)
    source[::7, ::5] = 255
    edited = an_edit(768, 1024)
    region = np.zeros((48, 64), bool)
    region[20:28, 30:38] = True
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = composite(source, edited, region, 8)
    # the tests' own comparisons come after it
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    changed = (out != source).any(axis=-1)
    rows, columns = np.nonzero(changed.any(axis=1))[0], np.nonzero(changed.any(axis=0))[0]
    assert 2500 - 73 <= rows[0] <= 2500 and 3500 <= rows[-1] + 1 <= 3500 + 73
    assert 3750 - 73 <= columns[0] <= 3750 and 4750 <= columns[-1] + 1 <= 4750 + 73
    assert changed[2500:3500, 3750:4750].mean() > 0.99
    assert grown < 500  # MB; the copy is 144


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(source=[[0]]), TypeError, "source: expected a numpy array, got list"),
        (dict(source=np.zeros((4, 4), np.int32)), TypeError, "source: expected uint8, uint16 or floats in .0, 1., got"),
        (dict(source=np.zeros((4, 4, 5), np.uint8)), ValueError, r"source: expected .* got \[4, 4, 5\]"),
        (dict(source=np.zeros((0, 4, 3), np.uint8)), ValueError, "source: expected one pixel or more"),
        (dict(edited=np.zeros((4, 4, 3), np.uint8)), TypeError, "edited: expected floats"),
        (dict(edited=np.zeros((4, 4), np.float32)), ValueError, r"edited: expected \[height, width, 3\], got \[4, 4\]"),
        (dict(edited=np.full((4, 4, 3), np.nan)), ValueError, "edited: expected finite values"),
        (dict(region=np.zeros((2, 2), int)), TypeError, "region: expected bool or floats"),
        (dict(region=np.full((2, 2), 1.5)), ValueError, r"region: expected values in \[0, 1\]"),
        (dict(region=np.full((2, 2), np.nan)), ValueError, r"region: expected values in \[0, 1\]"),
        (dict(region=np.zeros(4, bool)), ValueError, r"region: expected \[rows, columns\], got \[4\]"),
        (dict(feather=-1), ValueError, "feather: expected 0 or more, got -1"),
        (dict(feather=1.5), TypeError, "feather: expected an integer, got float"),
    ],
)
def test_bad_input_is_named(change, error, text):
    good = dict(
        source=np.zeros((8, 8, 3), np.uint8),
        edited=np.zeros((4, 4, 3), np.float32),
        region=np.ones((2, 2), bool),
        feather=2,
    )
    with pytest.raises(error, match=text):
        composite(**{**good, **change})


@pytest.mark.slow
def test_no_pipeline_is_imported():
    import subprocess
    import sys

    code = "import sys, specedit_kernels.images.composite as c, specedit_kernels.images.align as a\n"
    code += "assert not {'diffusers', 'transformers', 'specedit_kernels.engine'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.is_tensor(edit_weight(np.ones((1, 1), bool), (4, 4), 0))


@pytest.mark.parametrize("reach", [0, 1, 5, 40])
def test_a_mask_grows_as_a_pooling_would_grow_it(reach):
    mask = torch.from_numpy(np.random.default_rng(reach).random((23, 31)) < 0.01)
    mask[0, 30] = True
    pooled = F.max_pool2d(mask.float()[None], 2 * reach + 1, 1, reach)[0] > 0
    assert torch.equal(_grown(mask, reach), pooled)
    assert not _grown(torch.zeros(3, 4, dtype=torch.bool), reach).any()


def test_pixels_that_lie_on_each_other_are_copied():
    planes = torch.rand(3, 40, 50)
    assert torch.equal(resample(planes, (0, 40, 0, 50), (1, 1)), planes)
    part = resample(planes, (2, 9, 3, 30), (1.0, 1.0), (4.0, 7))
    assert torch.equal(part, planes[:, 9:16, 7:34])
    # beyond the input there is the border, as with any other scale
    beyond = resample(planes, (-2, 5, 0, 9), (1, 1))
    assert beyond.shape == (3, 7, 9) and (beyond[:, 2:] - planes[:, :5, :9]).abs().max() < 1e-5


@pytest.mark.parametrize("sizes", [
    ((4000, 30), (1184, 20)), ((37, 500), (32, 128)), ((64, 64), (150, 131)), ((1, 1), (32, 64)), ((5, 3), (5, 40)),
    ((300, 90), (16, 31)), ((136, 103), (83, 46)), ((100, 300), (90, 250)), ((61, 77), (60, 76)),
], ids=str)  # fmt: skip
def test_levels_are_resized_as_pillow_does(sizes, device):
    (width, height), wanted = sizes
    levels = a_source((height, width, 3), np.uint8)
    levels[::3] = np.where(levels[::3] > 127, 255, 0)  # which overshoot
    expected = torch.from_numpy(np.array(PIL.Image.fromarray(levels).resize(wanted, PIL.Image.Resampling.LANCZOS)))
    given = torch.from_numpy(levels).to(device)
    # the order of the axes is Pillow's choice
    found = [resized_levels(given, wanted, axes).cpu() for axes in ((1, 0), (0, 1))]
    assert any(torch.equal(each, expected) for each in found)
    for view in (levels, levels[::-1, ::-1][::-1, ::-1], PIL.Image.fromarray(levels)):
        assert torch.equal(as_pillow(np.asarray(view), wanted, torch.device(device)).cpu(), expected)


def test_a_gpu_resizes_from_the_second_picture_on_and_pillow_where_it_is_full(monkeypatch):
    class Gpu:  # what `as_pillow` asks of a device, with the CPU behind it
        type = "cuda"

    monkeypatch.setattr(resampling, "_copied", lambda levels, device: torch.from_numpy(np.array(levels)))
    monkeypatch.setattr(resampling, "_AXES", {})
    calls = []
    monkeypatch.setattr(resampling, "resized_levels", lambda *args: calls.append(args) or resized_levels(*args))
    grey, levels = np.full((200, 70, 3), 9, np.uint8), a_source((200, 70, 3), np.uint8)
    for picture, count, learnt in ((grey, 2, 0), (levels, 4, 1), (levels[::-1], 5, 1)):
        expected = np.array(PIL.Image.fromarray(picture).resize((32, 64), PIL.Image.Resampling.LANCZOS))
        assert np.array_equal(as_pillow(picture, (32, 64), Gpu()).numpy(), expected)
        assert len(calls) == count and len(resampling._AXES) == learnt

    def full(*args):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(resampling, "resized_levels", full)
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args: self)
    assert torch.equal(as_pillow(levels, (32, 64), Gpu()), as_pillow(levels, (32, 64), cpu))
