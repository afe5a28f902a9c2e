# SPDX-License-Identifier: Apache-2.0
"""A mask selects the same tokens in whatever form it comes."""

import logging

import numpy as np
import PIL.Image
import pytest
import torch

from specedit_kernels.images.files import Photo
from specedit_kernels.images.masks import token_mask

GRID = (3, 4)
SIDE = 8  # pixels of a token
H, W = GRID[0] * SIDE, GRID[1] * SIDE


def ramp(kind=np.float32):
    """From 0 to 1, left to right: the right two columns of tokens and one pixel of the second are over one half."""
    values = np.linspace(0, 1, W)
    values[15] = 0.6
    return np.tile(values, (H, 1)).astype(kind)


def wanted():
    columns = (ramp()[0] > 0.5).reshape(GRID[1], SIDE).any(1)
    return torch.from_numpy(np.tile(columns, GRID[0]))[None]


def levels(kind):
    return np.rint(ramp(np.float64) * np.iinfo(kind).max).astype(kind)


def grey_alpha(white, alpha):
    return np.dstack([white, alpha])


BYTES, WORDS, ONES = levels(np.uint8), levels(np.uint16), np.full((H, W), 255, np.uint8)
HARD = ramp() > 0.5
FORMS = {
    "bool": HARD,
    "uint8": BYTES,
    "uint16": WORDS,
    "float16": ramp(np.float16),
    "float32": ramp(),
    "float64": ramp(np.float64),
    "int32 of 0 and 1": HARD.astype(np.int32),
    "int64 of 0 and 1": HARD.astype(np.int64),
    "big endian": WORDS.astype(">u2"),
    "[H, W, 1]": BYTES[..., None],
    "[H, W, 2]": grey_alpha(ONES, BYTES),
    "[H, W, 3]": np.dstack([BYTES] * 3),
    "[H, W, 4]": np.dstack([ONES] * 3 + [BYTES]),
    "[1, H, W]": BYTES[None],
    "[1, 1, H, W]": BYTES[None, None],
    "[1, H, W, 3]": np.dstack([BYTES] * 3)[None],
    "negative strides": np.ascontiguousarray(BYTES[::-1, ::-1])[::-1, ::-1],
    "every other": np.repeat(BYTES, 2, axis=1)[:, ::2],
    "read-only": np.frombuffer(BYTES.tobytes(), np.uint8).reshape(H, W),
    "list of a mask": [BYTES],
    "tuple of a mask": (BYTES,),
    "nested lists": ramp().tolist(),
    "nested lists of bool": HARD.tolist(),
    "tensor of bytes": torch.from_numpy(BYTES),
    "tensor of words": torch.from_numpy(WORDS),
    "tensor of bool": torch.from_numpy(HARD),
    "tensor of int64": torch.from_numpy(HARD).long(),
    "tensor in bfloat16": torch.from_numpy(ramp()).bfloat16(),
    "tensor with grad": torch.from_numpy(ramp()).requires_grad_(),
    "tensor, transposed": torch.from_numpy(ramp()).T.contiguous().T,
    "mode 1": PIL.Image.fromarray(HARD),
    "mode L": PIL.Image.fromarray(BYTES),
    "mode LA": PIL.Image.merge("LA", [PIL.Image.fromarray(ONES), PIL.Image.fromarray(BYTES)]),
    "mode RGB": PIL.Image.fromarray(BYTES).convert("RGB"),
    "mode RGBA": PIL.Image.fromarray(np.dstack([ONES] * 3 + [BYTES])),
    "mode RGBa": PIL.Image.fromarray(np.dstack([ONES] * 3 + [BYTES])).convert("RGBa"),
    "mode RGBX": PIL.Image.fromarray(BYTES).convert("RGBX"),
    "mode CMYK": PIL.Image.fromarray(BYTES).convert("RGB").convert("CMYK"),
    "mode YCbCr": PIL.Image.fromarray(BYTES).convert("YCbCr"),
    "mode P": PIL.Image.fromarray(BYTES).convert("P"),
    "mode I;16": PIL.Image.fromarray(WORDS),
    "mode I": PIL.Image.fromarray(WORDS.astype(np.int32)),
    "mode F": PIL.Image.fromarray(ramp()),
}


@pytest.mark.parametrize("mask", FORMS.values(), ids=FORMS.keys())
def test_every_form_selects_the_same_tokens(mask):
    found = token_mask(mask, GRID)
    assert found.dtype == torch.bool and found.device.type == "cpu" and torch.equal(found, wanted())


def test_over_one_half_is_selected():
    for kind, top in ((np.uint8, 255), (np.uint16, 65535)):
        below, above = top // 2, top // 2 + 1
        assert not token_mask(np.full((H, W), below, kind), GRID).any()
        assert token_mask(np.full((H, W), above, kind), GRID).all()
        # the same as one of three channels, and half as opaque
        assert token_mask(np.full((H, W, 3), above, kind), GRID).all()
        assert not token_mask(np.full((H, W, 3), below, kind), GRID).any()
        assert not token_mask(np.dstack([np.full((H, W), top, kind), np.full((H, W), below, kind)]), GRID).any()
    assert not token_mask(np.full((H, W), 0.5), GRID).any() and not token_mask(np.full((H, W, 3), 0.5), GRID).any()


@pytest.mark.parametrize("mode", ["transparency of a palette", "of a grey"])
def test_what_is_transparent_is_not_selected(mode):
    if mode == "of a grey":
        image = PIL.Image.new("L", (W, H), 255)
        image.info["transparency"] = 255
    else:
        image = PIL.Image.new("P", (W, H), 0)
        image.putpalette([255, 255, 255])
        image.info["transparency"] = 0
    assert not token_mask(image, GRID).any()


def test_masks_of_other_sizes_and_several():
    small = np.zeros((3, 4), bool)
    small[1, 2] = True
    large = np.kron(small, np.ones((40, 31), bool))
    for mask in (small, large, [small, large], np.stack([large, large]), [PIL.Image.fromarray(large), small]):
        found = token_mask(mask, GRID)
        assert all(torch.equal(one, torch.from_numpy(small).reshape(-1)) for one in found)
    assert len(token_mask([small, large, np.stack([large, large])], GRID)) == 4
    one = np.zeros((500, 700), np.uint8)
    one[499, 0] = 255  # one pixel
    assert token_mask(one, GRID).nonzero().tolist() == [[0, 8]]


def test_the_commands_reading_selects_the_same(tmp_path):
    for name in ("mode 1", "mode L", "mode LA", "mode RGB", "mode RGBA", "mode P", "mode I;16"):
        FORMS[name].save(tmp_path / "mask.png")
        assert torch.equal(token_mask(Photo.open(tmp_path / "mask.png").array, GRID), wanted()), name


@pytest.mark.parametrize("mask, error, words", [
    (np.full((H, W), 255.0), ValueError, r"expected floats in \[0, 1\], got 255 to 255"),
    (PIL.Image.new("F", (W, H), 255), ValueError, r"floats in \[0, 1\]"),
    (torch.full((H, W), -1.0), ValueError, r"floats in \[0, 1\]"),
    (np.full((H, W), np.nan), ValueError, "finite"),
    (np.full((H, W), np.inf), ValueError, "finite"),
    (np.full((H, W), 255), ValueError, "expected 0 and 1 in int64, or uint8 or uint16; got 255"),
    (np.full((H, W), -1, np.int8), ValueError, "0 and 1 in int8"),
    (PIL.Image.new("I", (W, H), 70_000), ValueError, "0 to 65535"),
    (np.zeros((H, W), complex), TypeError, "complex"),
    (np.zeros((H, W), object), TypeError, "object"),
    (np.zeros((H, W), "U1"), TypeError, "got <U1"),
    (np.zeros(W), ValueError, r"expected \[H, W\].*, got \[32\]"),
    (np.zeros((2, 3, H, W)), ValueError, r"got \[2, 3, 24, 32\]"),
    (np.zeros((0, W)), ValueError, "a pixel or more"),
    ([], ValueError, "empty list"),
    ([[0, 1], [0]], ValueError, "ragged"),
    (torch.zeros(H, W).to_sparse(), TypeError, "plain tensor"),
    ("mask.png", TypeError, "got str"),
    (3, TypeError, "got int"),
])  # fmt: skip
def test_what_is_no_mask(mask, error, words):
    with pytest.raises(error, match=f"^mask_image: .*{words}") as raised:
        token_mask(mask, GRID)
    assert "\n" not in str(raised.value)


def test_zero_and_one_in_bytes_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "specedit_kernels"):
        assert not token_mask(HARD.astype(np.uint8), GRID).any()
    assert "its largest value is 1 of 255" in caplog.text


@pytest.mark.parametrize("size", [(24, 32), (48, 32), (25, 32), (24, 33), (2, 6), (3, 8)])
def test_any_selected_pixel_selects_its_token(size):
    """Sides that are multiples of the grid's go another way."""
    values = np.random.default_rng(0).integers(0, 256, (5, *size), np.uint8)
    values[np.random.default_rng(1).random(values.shape) < 0.99] = 0
    values[0, 0, :2] = 127, 128
    pixels = torch.from_numpy(values > 127.5).float()[:, None]
    expected = torch.nn.functional.adaptive_max_pool2d(pixels, GRID).bool().flatten(1)
    assert torch.equal(token_mask(values, GRID), expected) and 0 < expected.float().mean() < 1
