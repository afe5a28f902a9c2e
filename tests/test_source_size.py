# SPDX-License-Identifier: Apache-2.0
"""Results at the source's own size: outside the feathered region the source's bits, whatever its kind, size or file."""

import itertools

import numpy as np
import PIL.Image
import pytest
import torch
from combinations import ALL

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from test_align import moved, scene
from test_files import LINEAR, SRGB, XMP
from tiny_models import tiny_image, tiny_pipeline

from specedit_kernels import SpecEditConfig, SpecEditFluxKontextPipeline, edit_image
from specedit_kernels.engine import source_size, stages
from specedit_kernels.engine.source_size import put_back
from specedit_kernels.images.boxes import Box, box_tokens, boxes_of
from specedit_kernels.images.files import Photo

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = dict(max_area=128 * 128, _auto_resize=False, max_sequence_length=16, num_inference_steps=4)
FEATHER = 8


@pytest.fixture(scope="module")
def pipe():
    made = SpecEditFluxKontextPipeline.from_pipe(tiny_pipeline())
    made.set_progress_bar_config(disable=True)
    return made


def run(pipe, image, prompt="add a hat", **options):
    generator = torch.Generator().manual_seed(0)
    return pipe(image=image, prompt=prompt, generator=generator, **{**OPTIONS, "output_size": "source", **options})


def noise(shape, kind, seed=0):
    rng = np.random.default_rng(seed)
    return rng.random(shape).astype(kind) if np.dtype(kind).kind == "f" else rng.integers(
        0, np.iinfo(kind).max + 1, shape).astype(kind)  # fmt: skip


def places(mask, shape):
    """(inside, outside): bool [H, W], pixels of the region, and those past its seam, of a source of that shape."""
    rows, columns = mask.shape
    height, width = shape[:2]
    y, x = (np.arange(n) + 0.5 for n in (height, width))
    inside = mask[(y * rows / height).astype(int)[:, None], (x * columns / width).astype(int)]
    # the seam's width, and one working pixel for the interpolation, in pixels of the source
    reach = [(FEATHER + 1) * n / (16 * cells) for n, cells in ((height, rows), (width, columns))]
    near = inside.copy()
    for axis, by in enumerate(reach):
        padded = np.pad(near, [(int(by) + 1,) * 2 if a == axis else (0, 0) for a in range(2)])
        near = np.lib.stride_tricks.sliding_window_view(padded, 2 * int(by) + 3, axis=axis).any(-1)
    return inside, ~near


def check(found, source, mask):
    """found, source: arrays."""
    assert found.dtype == source.dtype and found.shape == source.shape
    inside, outside = places(np.asarray(mask), source.shape)
    assert np.array_equal(found[outside], source[outside])
    if source.ndim == 3 and source.shape[2] in (2, 4):
        assert np.array_equal(found[..., -1], source[..., -1])
    if inside.sum() > 8:
        assert (found != source)[inside].any()
    return outside


@pytest.mark.slow
@pytest.mark.parametrize("finish", ["full", "locked"])
@pytest.mark.parametrize("shape", [(150, 210), (150, 210, 1), (150, 210, 2), (150, 210, 3), (150, 210, 4)], ids=str)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32], ids=lambda k: np.dtype(k).name)
def test_arrays(pipe, kind, shape, finish):
    source = noise(shape, kind)
    before = source.copy()
    out = run(pipe, source, region=(0, 0, "40%", 60), specedit=SpecEditConfig(finish=finish))
    assert isinstance(out.images, list) and np.array_equal(source, before)
    outside = check(out.images[0], source, out.mask[0])
    assert outside.mean() > 0.4 and len(out.stats.drift) == 1
    assert (out.stats.drift[0] is None) == (finish == "locked")  # there the rest is the source's own


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16"])
def test_pil_modes(pipe, mode, caplog):
    if mode == "I;16":
        given = PIL.Image.fromarray(noise((150, 210), np.uint16))
    else:
        given = PIL.Image.fromarray(noise((150, 210, 4), np.uint8)).convert(mode if mode != "RGBX" else "RGB")
        given = given.convert(mode)
    given.info["dpi"] = (72, 72)
    out = run(pipe, given, region="0,0,30%,30%")
    kept = {"1": "L", "P": "RGBA" if "transparency" in given.info else "RGB", "RGBX": "RGB", "CMYK": "RGB",
            "YCbCr": "RGB"}.get(mode, mode)  # fmt: skip
    found = out.images[0]
    assert found.mode == kept and found.size == given.size and found.info["dpi"] == (72, 72)
    check(np.asarray(found), np.asarray(given if kept == mode else given.convert(kept)), out.mask[0])
    array = run(pipe, given, region="0,0,30%,30%", output_type="np").images[0]
    assert isinstance(array, np.ndarray) and np.array_equal(array, np.asarray(found))


def test_a_pictures_profile_stays_with_it(pipe):
    given = PIL.Image.fromarray(noise((150, 210, 3), np.uint8))
    given.info["icc_profile"] = LINEAR
    out = run(pipe, given, region="0,0,30%,30%")
    assert out.images[0].info["icc_profile"] == LINEAR
    check(np.asarray(out.images[0]), np.asarray(given), out.mask[0])
    # the same edit without the profile has other colours: the model sees sRGB
    del given.info["icc_profile"]
    assert not np.array_equal(np.asarray(run(pipe, given, region="0,0,30%,30%").images[0]), np.asarray(out.images[0]))


@pytest.mark.slow
def test_several_pictures_of_several_sizes(pipe):
    sources = [noise((150, 210, 3), np.uint8), noise((300, 90, 4), np.uint16)]
    out = run(pipe, sources, ["add a hat", "make the cat blue"], region=["0,0,50%,50%"])
    for found, source, mask in zip(out.images, sources, out.mask):
        check(found, source, mask)
    out = run(pipe, sources, ["add a hat", "make the cat blue"], region="0,0,50%,50%", num_images_per_prompt=2)
    assert [x.shape for x in out.images] == [(150, 210, 3)] * 2 + [(300, 90, 4)] * 2
    batch = np.stack([sources[0], sources[0][::-1]])
    out = run(pipe, batch, ["add a hat", "make the cat blue"], region=(0, 0, 20, 20))
    assert len(out.images) == 2
    check(out.images[1], batch[1], out.mask[1])


@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 40), (37, 2000), pytest.param((8000, 6000) if ALL else (4000, 3000), marks=pytest.mark.slow)],
    ids=str,
)
def test_sizes(pipe, size):
    source = noise((size[1], size[0], 3), np.uint8)
    out = run(pipe, source, region="0,0,20%,20%")
    check(out.images[0], source, out.mask[0])


def test_nothing_changes_gives_the_source(pipe):
    source = noise((150, 210, 3), np.uint16)
    out = run(pipe, source, specedit=SpecEditConfig(threshold=4.0))
    assert out.stats.fallback == "source" and np.array_equal(out.images[0], source) and out.stats.drift == [None]
    assert out.images[0] is not source


@pytest.mark.slow
def test_a_preview_ends_with_the_region(pipe):
    source = PIL.Image.fromarray(noise((150, 210, 3), np.uint8))
    config = SpecEditConfig(threshold=0.0, max_active=1.0)
    coarse = ["coarse"] * SpecEditConfig().step_counts(OPTIONS["num_inference_steps"])[0]
    for draft, steps in (("coarse", coarse), ("quarter", ["draft"] * 8), ("full_step", ["draft_step"])):
        chosen = SpecEditConfig(threshold=0.0, max_active=1.0, draft=draft)
        out = run(pipe, source, preview=True, specedit=chosen)
        assert [s.stage for s in out.stats.steps] == steps and "decode" in out.stats.seconds
        assert np.array_equal(np.asarray(out.images[0]), np.asarray(source)) and out.mask.any()
        # of the edit itself
        assert torch.equal(out.mask, run(pipe, source, specedit=chosen).mask)
    working = run(pipe, source, preview=True, specedit=config, output_size="working").images[0]
    assert np.array_equal(np.asarray(working), np.asarray(source.resize((128, 96), PIL.Image.LANCZOS)))
    assert not run(pipe, source, preview=True, region=(0, 0, 9, 9)).stats.steps


def test_a_mask_joins_the_drafts(pipe):
    source = PIL.Image.fromarray(noise((96, 128, 3), np.uint8))
    scores = run(pipe, source, preview=True).scores
    config = SpecEditConfig(threshold=float(scores.flatten().kthvalue(44).values), dilation=0)
    own = run(pipe, source, preview=True, specedit=config).mask
    assert own.any() and not own.all()
    region = "0,0,50%,100%"
    left = torch.zeros_like(own)
    left[..., :4] = True
    limited, added = (
        run(pipe, source, preview=True, specedit=config, region=region, mask_mode=mode) for mode in ("limit", "add")
    )
    assert torch.equal(limited.mask, own & left) and torch.equal(added.mask, own | left)
    assert limited.scores is not None and limited.stats.threshold == added.stats.threshold == config.threshold
    assert torch.equal(run(pipe, source, preview=True, region=region).mask, left)
    # a mask of one's own and a region are one
    white = PIL.Image.new("L", (128, 96))
    white.paste(255, (64, 0, 128, 96))
    assert run(pipe, source, preview=True, mask_image=white, region=region).mask.all()
    # an edit that is found outside the limit alone is none
    far = SpecEditConfig(threshold=float(scores[~left].max()) + 1e-3, dilation=3)
    if float(scores[left].max()) > far.threshold:
        right = run(pipe, source, specedit=far, region="50%,0,100%,100%", mask_mode="limit")
        assert right.stats.fallback == "source"


@pytest.mark.parametrize("options, error, words", [
    (dict(output_size="large"), ValueError, "output_size: expected one of"),
    (dict(output_type="latent"), ValueError, "output_type: expected 'pil' or 'np' with output_size='source'"),
    (dict(mask_mode="limit"), ValueError, "mask_mode: expected 'replace' without mask_image and region"),
    (dict(mask_mode="both", region=(0, 0, 1, 1)), ValueError, "mask_mode: expected one of"),
    (dict(preview="yes"), ValueError, "preview: expected one of"),
    (dict(region=(0, 0, 1)), ValueError, r"region: expected \(x0, y0, x1, y1\)"),
    (dict(region=7), TypeError, r"region: expected \(x0, y0, x1, y1\)"),
    (dict(region=[]), ValueError, "region: expected a box or more, got none"),
    (dict(region=(200, 0, 300, 5)), ValueError, "region: box 200,0,300,5: selects nothing of 160 x 128 pixels"),
    (dict(image=torch.zeros(3, 32, 32)), TypeError, "image: expected PIL pictures or arrays"),
    (dict(image=np.zeros((8, 8, 3), np.int32)), TypeError, "image: expected uint8, uint16 or floats"),
    (dict(image=np.zeros((8, 8, 5), np.uint8)), ValueError, r"image: expected \[H, W\] or"),
], ids=str)  # fmt: skip
def test_what_cannot_be(pipe, options, error, words):
    with pytest.raises(error, match=f"^{words}"):
        run(pipe, **{"image": tiny_image(128, 160), **options})


def test_boxes():
    assert [str(b) for b in boxes_of([(0, 1, 2, 3), "5%,0,50%,100%", Box.parse("1,1,2,2")])] == [
        "0,1,2,3", "5%,0,50%,100%", "1,1,2,2"]  # fmt: skip
    assert len(boxes_of((0, "10%", 3.5, 9))) == 1 and len(boxes_of(["0,0,1,1"] * 4)) == 4
    cases = (((0, 0, 1, 1), [0]), ((15, 0, 17, 1), [0, 1]), ((16, 15.5, 32, 16), [1]), ("50%,50%,100%,100%", [6, 7]))
    for box, expected in cases:
        assert box_tokens(boxes_of(box), (64, 32), (2, 4)).nonzero().flatten().tolist() == expected
    assert box_tokens(boxes_of((0, 0, 1, 1)), (1, 1), (2, 4)).all()


@pytest.mark.parametrize("shift, zoom, colour", [((3.0, -2.0), 1.0, 1.0), ((0, 0), 1.01, 0.98)])
def test_drift_is_undone_before_the_edit_is_put_back(shift, zoom, colour):
    """The run is shifted against its source: without alignment, the region's border would show it."""
    source = scene(0, (320, 288))
    decoded = (moved(source, *shift, zoom).astype(np.float32) * colour / 255).clip(0, 1)
    region = np.zeros((18, 20), bool)
    region[6:10, 6:12] = True
    unit = source.astype(np.float32) / 255
    (out, drift), (plain, none) = (
        put_back(Photo.of(source), unit, decoded, region, FEATHER, drifts) for drifts in (True, False)
    )
    assert none is None and drift.found and (drift.moved or drift.recoloured)
    assert np.abs(np.array(drift.shift) - shift).max() < 0.25 and abs(drift.scale[0] - zoom) < 0.002
    inside, outside = places(region, source.shape)
    assert np.array_equal(out[outside], source[outside])
    off, before = (np.abs(x.astype(float) - source)[inside].mean() for x in (out, plain))
    assert off < 0.3 * before
    same, drift = put_back(Photo.of(source), unit, unit, region, FEATHER, True)
    assert np.array_equal(same, source) and not drift.moved and not drift.recoloured
    assert put_back(Photo.of(source), unit, decoded, region | True, FEATHER, True)[1] is None


def test_a_weak_drafts_threshold_has_a_floor():
    scores = torch.tensor([[0.05, 0.01], [0.5, 0.1], [2.0, 1.0]])
    free = stages.threshold_scale(scores, 0.5)[:, 0]
    scale = stages.threshold_scale(scores, 0.5, 0.1)[:, 0]
    assert torch.allclose(scale * 0.1, torch.tensor([0.03, 0.05, 0.1])) and free[0] < 0.3
    # a threshold that is under it itself, as another autoencoder may have
    assert torch.equal(stages.threshold_scale(scores, 0.5, 0.03)[:, 0], free)


# files


def a_file(folder, name, orientation=1, kind=np.uint8, channels=3):
    array = noise((150, 210) if channels == 1 else (150, 210, channels), kind)
    found = PIL.Image.Exif()
    found[0x010F], found[0x0112] = "Maker", orientation
    path = folder / name
    photo = Photo(array, SRGB, found.tobytes(), XMP, (300.0, 300.0))
    if kind == np.uint8 and path.suffix != ".tif":  # by Pillow, for the orientation
        options = dict(quality=95) if path.suffix == ".jpg" else dict(lossless=True) if path.suffix == ".webp" else {}
        PIL.Image.fromarray(array).save(path, icc_profile=SRGB, exif=found.tobytes(), dpi=(300, 300), **options)
    else:
        photo.save(path)
    return path


CASES = [
    *((name, turn, np.uint8, 3) for name, turn in itertools.product(("a.png", "a.jpg", "a.webp"), (1, 3, 6, 8))),
    ("a.png", 1, np.uint16, 3), ("a.png", 1, np.uint16, 1), ("a.tif", 1, np.uint16, 4), ("a.tif", 1, np.uint8, 2),
    ("a.png", 6, np.uint8, 4), ("a.png", 1, np.uint8, 1),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name, turn, kind, channels", CASES, ids=str)
def test_files_keep_their_bits_and_metadata(pipe, tmp_path, name, turn, kind, channels):
    path = a_file(tmp_path, name, turn, kind, channels)
    source = Photo.open(path)
    assert source.array.shape[:2] == ((210, 150) if turn in (6, 8) else (150, 210))
    result = edit_image(path, "add a hat", model=pipe, region="0,0,40%,40%", **OPTIONS)
    for out in ("o.png", "o.tif", "o.webp"):
        if out == "o.webp" and (kind == np.uint16 or channels < 3):
            continue
        result.save(tmp_path / out)
        found = Photo.open(tmp_path / out)
        outside = check(found.array, source.array, result.mask)
        assert outside.mean() > 0.4
        assert found.profile == source.profile == SRGB and found.xmp == source.xmp
        tags = PIL.Image.Exif()
        tags.load(found.exif)
        assert tags[0x010F] == "Maker" and tags.get(0x0112, 1) == 1  # its pixels are upright
        assert out == "o.webp" or found.dpi == pytest.approx(source.dpi, abs=0.1)
    notes = result.save(tmp_path / "o.jpg")
    assert any("JPEG encodes every pixel again" in note for note in notes)
    assert (turn == 1) == ("turned upright by its EXIF orientation" not in result.notes)


@pytest.mark.slow
def test_edit_image_takes_paths_pictures_and_arrays(pipe, tmp_path):
    path = a_file(tmp_path, "a.png")
    options = dict(model=pipe, region="0,0,40%,40%", seed=3, **OPTIONS)
    first = edit_image(path, "add a hat", **options)
    assert isinstance(first.picture, PIL.Image.Image) and first.picture.size == (210, 150) and first.mask.any()
    assert first.stats.nfe == 4
    same = edit_image(PIL.Image.open(path), "add a hat", **options)
    assert np.array_equal(np.asarray(first.picture), np.asarray(same.picture)) and same.photo.exif == first.photo.exif
    array = edit_image(np.asarray(PIL.Image.open(path)), "add a hat", **options)
    assert isinstance(array.picture, np.ndarray) and np.array_equal(array.picture, np.asarray(first.picture))
    white = PIL.Image.new("L", (21, 15), 255)
    white.save(tmp_path / "white.png")
    all_of = edit_image(path, "add a hat", **{**options, "region": None, "mask": tmp_path / "white.png"})
    assert all_of.mask.all()
    working = edit_image(path, "add a hat", **{**options, "output_size": "working"})
    assert working.picture.size == (128, 96) and working.photo.profile == SRGB
    with pytest.raises(TypeError, match="^image: expected a path, a PIL picture or an array, got int"):
        edit_image(3, "add a hat", **options)
    with pytest.raises(TypeError, match="^model: expected a folder"):
        edit_image(path, "add a hat", model=tiny_pipeline())
    with pytest.raises(ValueError, match="no such file"):
        edit_image(tmp_path / "none.png", "add a hat", **options)


def test_a_full_device_loses_no_edit(monkeypatch):
    """Putting the edit in runs on the CPU where the GPU's memory does not suffice."""
    photo = Photo.of(np.zeros((40, 60, 3), np.uint8))
    decoded, region = np.ones((20, 30, 3), np.float32), np.ones((2, 3), bool)
    expected = source_size.put_back(photo, decoded, decoded, region, 0, False)
    devices, composite = [], source_size.composite

    def full(*args, device):
        devices.append(device)
        if device != "cpu":
            raise torch.cuda.OutOfMemoryError("full")
        return composite(*args, device=device)

    monkeypatch.setattr(source_size, "composite", full)
    array, drift = source_size.put_back(photo, decoded, decoded, region, 0, False, "cuda")
    assert devices == ["cuda", "cpu"] and drift is None and np.array_equal(array, expected[0]) and array.any()
