# SPDX-License-Identifier: Apache-2.0
"""Measures of pictures, and contact sheets: against scikit-image's figures, and against ones found by hand."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image

from specedit_kernels.images import measures, sheet


def pair(seed=0, size=(37, 52)):
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(3, *size, generator=generator)
    return a, (a + 0.1 * torch.randn(3, *size, generator=generator)).clamp(0, 1)


def everywhere(a):
    return torch.ones(a.shape[1:], dtype=torch.bool)


def test_psnr_by_hand():
    a = torch.zeros(3, 4, 4)
    b = a.clone()
    b[:, :2] = 0.1  # an error of .01 in half of the pixels
    assert measures.psnr(a, b, everywhere(a)) == pytest.approx(-10 * math.log10(0.005))
    top = torch.zeros(4, 4, dtype=torch.bool)
    top[:2] = True
    assert measures.psnr(a, b, top) == pytest.approx(20.0)
    assert measures.psnr(a, b, ~top) == math.inf
    assert measures.psnr(a, b, torch.zeros(4, 4, dtype=torch.bool)) is None


def test_ssim_by_hand():
    """Of two flat pictures the term of their means is all that is left; of equal ones it is 1."""
    a, b = torch.full((3, 20, 20), 0.5), torch.full((3, 20, 20), 0.25)
    expected = (2 * 0.5 * 0.25 + 1e-4) / (0.5**2 + 0.25**2 + 1e-4)
    assert measures.ssim(a, b, everywhere(a)) == pytest.approx(expected, abs=1e-6)
    a, _ = pair()
    assert measures.ssim(a, a, everywhere(a)) == pytest.approx(1.0, abs=1e-6)
    assert measures.ssim(a, a, torch.zeros(a.shape[1:], dtype=torch.bool)) is None


def test_ssim_by_its_definition():
    """At one pixel, from the 11 x 11 pixels around it with Gaussian weights."""
    a, b = pair()
    at = np.arange(-5, 6)
    weight = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    y, x, found = 20, 25, []
    for p, q in zip(a.double().numpy(), b.double().numpy()):
        p, q = (z[y - 5 : y + 6, x - 5 : x + 6] for z in (p, q))
        mean_p, mean_q = (weight * p).sum(), (weight * q).sum()
        var_p, var_q = (weight * (p - mean_p) ** 2).sum(), (weight * (q - mean_q) ** 2).sum()
        both = (weight * (p - mean_p) * (q - mean_q)).sum()
        upper = (2 * mean_p * mean_q + 1e-4) * (2 * both + 9e-4)
        found.append(upper / ((mean_p**2 + mean_q**2 + 1e-4) * (var_p + var_q + 9e-4)))
    assert measures.ssim_map(a, b)[y, x].item() == pytest.approx(np.mean(found), abs=1e-6)


@pytest.mark.parametrize("size", [(37, 52), (16, 16), (11, 64)], ids=str)
def test_ssim_and_psnr_are_scikit_images(size):
    metrics = pytest.importorskip("skimage.metrics")
    a, b = pair(1, size)
    first, second = (x.permute(1, 2, 0).double().numpy() for x in (a, b))
    _, expected = metrics.structural_similarity(
        first, second, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0,
        full=True,
    )  # fmt: skip
    assert np.allclose(measures.ssim_map(a, b).numpy(), expected.mean(-1), atol=1e-6)
    expected = metrics.peak_signal_noise_ratio(first, second, data_range=1.0)
    assert measures.psnr(a, b, everywhere(a)) == pytest.approx(expected)


def test_ssim_of_pictures_smaller_than_its_window():
    a, b = pair(2, (3, 7))
    assert measures.ssim_map(a, b).isfinite().all()
    assert measures.ssim(a, a, everywhere(a)) == pytest.approx(1.0, abs=1e-6)


def test_level_differences():
    a = torch.zeros(3, 2, 2)
    b = a.clone()
    b[0, 0, 0] = 10 / 255
    where = torch.tensor([[True, True], [False, False]])
    mean, largest = measures.level_differences(a, b, where)
    assert mean == pytest.approx(10 / 6) and largest == pytest.approx(10)
    assert measures.level_differences(a, b, ~where) == (0, 0)
    assert measures.level_differences(a, b, where & ~where) is None


def test_changed_tokens():
    a = torch.zeros(3, 32, 32)
    b = a.clone()
    b[1, 16:20, :4] = 0.1  # 16 of 256 pixels
    b[1, 0, 16:20] = 0.1  # 4 of 256: too few
    b[1, 16:, 16:] = 0.07  # too little
    changed = measures.changed_tokens(a, b, 16)
    assert changed.tolist() == [[False, False], [True, False]]
    pixels = measures.to_pixels(changed, 16)
    assert pixels.shape == (32, 32) and pixels[16:, :16].all() and pixels.sum() == 256


def test_sheet_has_every_picture_at_its_ratio():
    columns = {"a": [Image.new("RGB", (64, 32), "red"), None], "b": [Image.new("RGB", (32, 32), "blue")] * 2}
    drawn = np.asarray(sheet.draw_sheet(columns, ["one", "zwei 三"], 64))
    assert drawn.shape == (sheet.TITLE + 2 * (64 + sheet.CAPTION), 2 * 64 + sheet.GAP, 3)
    second = sheet.TITLE + 64 + sheet.CAPTION
    assert (drawn[sheet.TITLE + 16, 32] == (255, 0, 0)).all() and (drawn[sheet.TITLE + 48, 32] == 255).all()
    assert (drawn[second + 32, 32] == 255).all() and (drawn[second + 32, 100] == (0, 0, 255)).all()
    assert (drawn[: sheet.TITLE] < 128).any() and (drawn[-sheet.CAPTION :] < 128).any()  # the title, the last caption


@pytest.mark.slow
def test_sheet_is_the_largest_within_its_limit():
    random = np.random.default_rng(0)
    columns = {x: [Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(2)] for x in "ab"}
    data = sheet.encode_within(columns, ["one", "two"], 200_000)
    assert data.startswith(b"\x89PNG") and 100_000 < len(data) <= 200_000
    with pytest.raises(ValueError, match="do not fit"):
        sheet.encode_within(columns, ["one", "two"], 100)


def test_texture_is_that_of_the_finest_detail():
    rng = np.random.default_rng(0)
    source = np.full((48, 64, 3), 0.5)
    source[:, :32] += 0.2 * rng.standard_normal((48, 32, 1))
    ratio = measures.texture_ratio(source, source, 16)
    assert ratio.shape == (3, 4) and np.allclose(ratio[:, :2], 1) and np.isnan(ratio[:, 3]).all()
    weaker = 0.5 + (source - 0.5) * 0.25
    assert np.allclose(measures.texture_ratio(source, weaker, 16)[:, 0], 0.25, atol=1e-3)
    assert np.allclose(measures.texture_ratio(weaker, source, 16)[:, 0], 4, atol=0.02)
    # brightness, colour at the same luma, and a level of 8 bits are no texture
    assert np.allclose(measures.texture_ratio(source, source + 0.1, 16)[:, :2], 1, atol=1e-5)
    noisy = source.copy()
    noisy[:, 32:] += rng.choice([-1, 1], (48, 32, 1)) * 0.5 / 255
    assert np.isnan(measures.texture_ratio(source, noisy, 16)[:, 3]).all()
