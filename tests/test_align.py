# SPDX-License-Identifier: Apache-2.0
"""Drift that is known is found, and undone; where there is none, or nothing to go by, pictures stay as they are."""

import io

import numpy as np
import pytest
import torch

PIL = pytest.importorskip("PIL")
from PIL import Image

from specedit_kernels.images.align import Drift, align, estimate_drift
from specedit_kernels.images.resample import resample

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SIZE = (320, 288)  # width, height
PAD = 32


def scene(seed, size=SIZE):
    """uint8 [h, w, 3]: shapes of several sizes and grain, with colour."""
    rng = np.random.default_rng(seed)
    width, height = size
    out = np.full((height, width, 3), 0.5)
    for octave in (4, 8, 16, 32, 64):
        coarse = rng.random((octave, octave, 3)).astype(np.float32)
        planes = [np.asarray(Image.fromarray(coarse[..., c]).resize(size, Image.BICUBIC)) for c in range(3)]
        out += (np.stack(planes, -1) - 0.5) * (0.7 if octave < 64 else 0.3)
    return (out.clip(0.03, 0.97) * 255).round().astype(np.uint8)


def moved(picture, dx, dy, zoom):
    """By Pillow, about the middle, with what is there outside."""
    height, width = picture.shape[:2]
    padded = Image.fromarray(np.pad(picture, ((PAD, PAD), (PAD, PAD), (0, 0)), mode="reflect"))
    x = width / 2 + PAD - (width / 2 + dx) / zoom
    y = height / 2 + PAD - (height / 2 + dy) / zoom
    way = (1 / zoom, 0, x, 0, 1 / zoom, y)
    return np.array(padded.transform((width, height), Image.AFFINE, way, Image.BICUBIC))


def jpeg(picture, quality=75):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def with_disc(picture, other, share=0.1, at=(0.4, 0.6)):
    y, x = (np.arange(n) / n for n in picture.shape[:2])
    inside = (y[:, None] - at[1]) ** 2 + (x - at[0]) ** 2 < share / np.pi
    return np.where(inside[..., None], other, picture)


def corner_error(drift, dx, dy, zoom):
    """Pixels of the source, at the corner that is furthest off."""
    ends = []
    for scale, shift, side, move in zip(drift.scale, drift.shift, drift.source_size, (dx, dy)):
        ends.append(max(abs(shift + e * scale * side / 2 - move - e * zoom * side / 2) for e in (-1, 1)))
    return float(np.hypot(*ends))


@pytest.fixture(scope="module")
def pair():
    source = scene(0)
    return source, with_disc(source, scene(1))


@pytest.mark.slow
@pytest.mark.parametrize("as_jpeg", [False, True])
@pytest.mark.parametrize(
    "case",
    [(1, 0, 1), (0.5, -0.5, 1), (-3.3, 2.6, 1), (8, 8, 1), (0, 0, 1.02), (0, 0, 0.98), (-8, 6.5, 0.98), (5, -7, 1.02)],
)
def test_a_known_drift_is_found_within_a_quarter_pixel(pair, case, as_jpeg, one_thread):
    source, edited = pair
    edited = moved(edited, *case)
    found = estimate_drift(source, jpeg(edited) if as_jpeg else edited)
    assert found.found and found.moved
    assert corner_error(found, *case) <= 0.25


@pytest.mark.slow
def test_undrifted_pairs_stay_as_they_are(pair, one_thread):
    source, edited = pair
    for other in (source, edited, jpeg(edited), jpeg(source, 95)):
        found = estimate_drift(source, other)
        assert found.found and not found.moved and not found.recoloured, str(found)
        back, seen = align(other, found, SIZE)
        assert seen.all() and np.array_equal(back, other.astype(np.float32) / np.float32(255))
    assert "no drift" in estimate_drift(source, edited).describe()


def test_floats_come_back_bit_for_bit(one_thread):
    source = (scene(0) / 255).astype(np.float32)
    found = estimate_drift(source, source.copy())
    assert np.array_equal(align(source, found, SIZE)[0], source)


@pytest.mark.slow
@pytest.mark.parametrize(
    "gain, offset",
    [((1.02,) * 3, (0.0,) * 3), ((0.98,) * 3, (0.0,) * 3), ((0.95, 1, 1.04), (0.02, 0.01, -0.02))],
)
def test_colours_are_found_and_undone(pair, gain, offset, one_thread):
    source, edited = pair
    other = (edited * np.array(gain) + 255 * np.array(offset)).round().clip(0, 255).astype(np.uint8)
    other = moved(other, 2.4, -1.3, 1.01)
    found = estimate_drift(source, other)
    assert found.recoloured
    # at black, and at white
    np.testing.assert_allclose(found.offset, offset, atol=0.006)
    np.testing.assert_allclose(np.add(found.gain, found.offset), np.add(gain, offset), atol=0.006)
    back, seen = align(other, found, SIZE)
    off = np.abs(back - edited / 255).mean(axis=-1)
    # the first rows and columns were made up by `moved`
    seen[:8] = seen[-8:] = seen[:, :8] = seen[:, -8:] = False
    assert off[seen].mean() < 0.01 and np.median(off[seen]) < 0.006


@pytest.mark.slow
def test_a_painted_wall_is_no_recolouring(one_thread):
    source = scene(2)
    source[: SIZE[1] * 2 // 5] = (200, 200, 190)
    edited = source.copy()
    edited[: SIZE[1] * 2 // 5] = (90, 140, 220)
    found = estimate_drift(source, edited)
    assert found.found and not found.moved and not found.recoloured, str(found)


@pytest.mark.slow
def test_other_scenes_and_backgrounds_are_not_found(pair, one_thread):
    source, _ = pair
    background = with_disc(scene(3), source, share=0.15)
    for other in (scene(4), background, np.zeros_like(source), np.full_like(source, 200)):
        found = estimate_drift(source, other)
        assert not found.found and not found.moved and not found.recoloured
        assert "no drift could be estimated" in str(found)
        assert np.array_equal(align(other, found, SIZE)[0], other.astype(np.float32) / np.float32(255))


@pytest.mark.slow
def test_what_is_excluded_has_no_vote(pair, one_thread):
    source, _ = pair
    other = moved(source, 1.5, 0, 1)
    columns = int(0.6 * SIZE[0])
    other[:, :columns] = moved(source, -6, 4, 1)[:, :columns]  # most of the picture goes elsewhere
    exclude = np.zeros((10, 10), bool)
    exclude[:, :7] = True
    assert corner_error(estimate_drift(source, other), -6, 4, 1) < 0.5
    assert corner_error(estimate_drift(source, other, exclude), 1.5, 0, 1) < 0.25


@pytest.mark.slow
def test_what_moved_by_itself_has_no_vote(pair, one_thread):
    """An editor draws a part of the picture again a little off its place: no similarity holds for all of it."""
    source, _ = pair
    rows = int(0.4 * SIZE[1])
    for own in ((1.2, 0), (-2.0, -0.5)):  # along a line that is no zoom
        other = moved(source, 2.5, -1.5, 1)
        other[-rows:] = moved(source, 2.5 + own[0], -1.5 + own[1], 1)[-rows:]
        found = estimate_drift(source, other)
        assert found.found and corner_error(found, 2.5, -1.5, 1) <= 0.05, str(found)


@needs_cuda
def test_the_device_finds_the_same(pair):
    source, edited = pair
    other = (moved(edited, 3.3, -2.1, 1.01) * np.float32(0.98)).round().astype(np.uint8)
    exclude = np.zeros((12, 9), bool)
    exclude[4:8, 3:6] = True
    for hidden in (None, exclude):
        here, there = (estimate_drift(source, other, hidden, device) for device in ("cpu", "cuda"))
        assert there.found and there.recoloured == here.recoloured
        np.testing.assert_allclose(there.shift + there.scale, here.shift + here.scale, atol=5e-3)
        np.testing.assert_allclose(there.gain + there.offset, here.gain + here.offset, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(160, 144), (480, 432), (327, 288)])
def test_another_size_is_a_resize(pair, size, one_thread):
    source, edited = pair
    other = np.asarray(Image.fromarray(edited).resize(size, Image.LANCZOS))
    found = estimate_drift(source, other)
    assert found.found and not found.moved, str(found)
    assert found.same_aspect == (size != (327, 288))
    assert f"{size[0]} x {size[1]}" in str(found)
    assert ("stretched" in str(found)) == (size == (327, 288))
    back, seen = align(other, found, SIZE)
    assert back.shape == source.shape and seen.all()
    assert np.abs(back - edited / 255).mean() < 0.03


@pytest.mark.slow
def test_a_crop_is_found_where_it_was_taken(pair, one_thread):
    source, edited = pair
    left, width = 40, 230
    cut = np.asarray(Image.fromarray(edited[:, left : left + width]).resize((460, 576), Image.LANCZOS))
    found = estimate_drift(source, cut)
    (ax, ay), (bx, by) = found.placement()
    assert found.found and not found.same_aspect
    np.testing.assert_allclose([ax, ay], 2, rtol=0.003)
    np.testing.assert_allclose([bx, by], [-2 * left, 0], atol=0.6)
    back, seen = align(cut, found, SIZE)
    assert abs(seen.mean() - width / SIZE[0]) < 0.01 and not seen[:, : left - 1].any()
    assert np.abs(back - edited / 255)[seen].mean() < 0.02
    assert "cropped" in str(found) or "cut" in str(found)


@pytest.mark.slow
def test_a_letterbox_is_found(pair, one_thread):
    source, edited = pair
    boxed = np.zeros((SIZE[0], SIZE[0], 3), np.uint8)
    boxed[16 : 16 + SIZE[1]] = edited
    found = estimate_drift(source, boxed)
    back, seen = align(boxed, found, SIZE)
    assert found.found and seen.all()
    assert np.abs(back - edited / 255).mean() < 0.004
    assert "with a border" in str(found)


@pytest.mark.slow
def test_a_large_picture_and_a_small_edit_of_it(one_thread):
    source = scene(5, (2400, 1800))
    other = moved(np.asarray(Image.fromarray(source).resize((800, 600), Image.LANCZOS)), 1.5, -0.7, 1.01)
    found = estimate_drift(source, other)
    assert corner_error(found, 4.5, -2.1, 1.01) <= 0.5  # a sixth of the edited picture's pixels
    back, _ = align(other, found, (800, 600))
    assert back.shape == (600, 800, 3)


@pytest.mark.slow
def test_kinds_of_numbers_agree(pair, one_thread):
    source, edited = pair
    other = moved(edited, 3, 1, 1)
    as_16 = [p.astype(np.uint16) * 257 for p in (source, other)]
    as_floats = [(p / 255).astype(kind) for p, kind in ((source, np.float32), (other, np.float64))]
    first = estimate_drift(source, other)
    for pictures in (as_16, as_floats):
        found = estimate_drift(*pictures)
        np.testing.assert_allclose(found.shift + found.scale, first.shift + first.scale, atol=1e-3)
    assert estimate_drift(source, other) == first  # the same bits again


@pytest.mark.parametrize("size", [(1, 1), (5, 400), (31, 31), (33, 40), (64, 2000)])
def test_sizes_with_little_to_see(size, one_thread):
    source = scene(6, size)
    found = estimate_drift(source, jpeg(source, 60))
    assert not found.moved
    assert estimate_drift(source, source).found
    assert np.isfinite(align(source, found, (7, 3))[0]).all()
    nan = np.full(source.shape, np.nan, np.float32)
    assert not estimate_drift(source, nan).found


def test_bad_input_is_named():
    good = np.zeros((40, 40, 3), np.uint8)
    with pytest.raises(TypeError, match="source: expected a numpy array, got list"):
        estimate_drift([1], good)
    with pytest.raises(ValueError, match=r"edited: expected \[height, width, 3\], got \[40, 40\]"):
        estimate_drift(good, good[..., 0])
    with pytest.raises(TypeError, match="edited: expected uint8, uint16 or floats .* got int64"):
        estimate_drift(good, good.astype(np.int64))
    with pytest.raises(ValueError, match="exclude: expected bool"):
        estimate_drift(good, good, exclude=np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"edited: expected \[20, 30\] pixels, got \[40, 40\]"):
        align(good, Drift((30, 20), (30, 20)), (30, 20))


def test_resampling_is_pillows():
    picture = scene(7)[..., 0].astype(np.float32) / 255
    from torch import from_numpy

    for width, height in ((100, 77), (900, 500), SIZE):
        found = resample(from_numpy(picture)[None], (0, height, 0, width), (SIZE[0] / width, SIZE[1] / height))
        right = np.asarray(Image.fromarray(picture).resize((width, height), Image.LANCZOS))
        np.testing.assert_allclose(found[0].numpy(), right, atol=2e-6)
    window = resample(from_numpy(picture)[None], (10, 90, 130, 200), (0.37, 0.41), (3.2, -5))
    whole = resample(from_numpy(picture)[None], (0, 300, 0, 400), (0.37, 0.41), (3.2, -5))
    np.testing.assert_allclose(window.numpy(), whole[:, 10:90, 130:200].numpy(), atol=2e-6)
