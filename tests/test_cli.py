# SPDX-License-Identifier: Apache-2.0
"""The command, end to end on a tiny model with random weights: what it writes, what it says, how it fails."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tiny_models import qwen_text, tiny_image, tiny_pipeline, tiny_qwen

from specedit_kernels.cli import main, mask, models, output
from specedit_kernels.cli.text import UserError, say
from specedit_kernels.images.files import Photo

ROOT = Path(__file__).parents[1]
PHOTO = ROOT / "bench" / "quality" / "data" / "photos" / "chelsea0.jpg"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    (folder / "specedit.json").write_text(json.dumps({"resolution": 128, "max_sequence_length": 16}))
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A Qwen-Image-Edit-Plus folder without its text encoder."""
    folder = tmp_path_factory.mktemp("qwen")
    tiny_qwen(plus=True, zero_cond_t=True).save_pretrained(folder)
    (folder / "specedit.json").write_text(json.dumps({"resolution": 128}))
    return folder


@pytest.fixture
def texts(monkeypatch):
    """Stands in for the text encoder, which needs torchvision; gives what it was asked: (prompt, pictures)."""
    from specedit_kernels import SpecEditQwenImageEditPlusPipeline as Plus

    asked, load = [], Plus.from_pretrained
    absent = dict(text_encoder=None, tokenizer=None, processor=None)

    def encode_prompt(self, prompt, image, **options):
        asked.append((prompt if isinstance(prompt, str) else prompt[0], len(image)))
        return qwen_text(len(prompt)).values()

    monkeypatch.setattr(Plus, "encode_prompt", encode_prompt)
    monkeypatch.setattr(Plus, "_optional_components", [*Plus._optional_components, *absent])
    monkeypatch.setattr(Plus, "from_pretrained", lambda folder, **options: load(folder, **absent, **options))
    return asked


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.png"
    tiny_image(128, 160).save(path)
    return path


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fails(capsys, *arguments):
    """The one line of a failing command."""
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == ""
    assert err.startswith("specedit: ") and err.count("\n") == 1 and "Traceback" not in err
    return err


def half(tmp_path, size=(160, 128)):
    mask = PIL.Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    path = tmp_path / "white_left.png"
    mask.save(path)
    return path


@pytest.mark.slow
def test_edit_writes_picture_and_overlay_and_a_summary(capsys, tmp_path, model, source):
    out = tmp_path / "out" / "edited.png"
    out.parent.mkdir()
    code, text, _ = run(
        capsys, "edit", source, "make the cat blue", "-o", out, "--model", model, "--device", "cpu",
        "--mask", half(tmp_path), "--seed", 3, "--quality", "paper", "--preset", 9,
    )  # fmt: skip
    assert code == 0
    edited, overlay = PIL.Image.open(out), PIL.Image.open(out.with_name("mask.png"))
    # run at the area of 128 x 128 in whole blocks of 32 pixels; the seam, up to 8.5 pixels there, is under 11 here
    assert edited.size == overlay.size == (160, 128) and "160 x 128 (run at 128 x 96)" in text
    expected = np.array(PIL.Image.open(source))
    assert (np.array(edited)[:, 80 + 11 :] == expected[:, 80 + 11 :]).all()
    assert not (np.array(edited)[:, :80] == expected[:, :80]).all()
    assert sorted(p.name for p in out.parent.iterdir()) == ["edited.png", "mask.png"]
    for word in ("24 of 48 tokens", "50.0 %", "2 x coarse 24", "4 x mixed 60", "3 x full 96", "reference", "28 steps"):
        assert word in text
    assert len(text.splitlines()) <= 13


@pytest.mark.slow
def test_edit_is_repeatable_and_seeds_differ(capsys, tmp_path, model, source):
    pictures = []
    for i, seed in enumerate((1, 1, 2)):
        out = tmp_path / f"{i}.png"
        options = ("--model", model, "--device", "cpu", "--mask", half(tmp_path), "--seed", seed, "--steps", 4)
        assert run(capsys, "edit", source, "add a hat", "-o", out, *options)[0] == 0
        pictures.append(np.array(PIL.Image.open(out)))
    assert (pictures[0] == pictures[1]).all() and not (pictures[0] == pictures[2]).all()


@pytest.mark.slow
def test_edit_finds_the_class_of_the_folder(capsys, tmp_path, qwen, source, texts):
    out, other = tmp_path / "edited.png", tmp_path / "other.png"
    tiny_image(160, 96, seed=1).save(other)
    options = ("-o", out, "--model", qwen, "--device", "cpu", "--mask", half(tmp_path))
    code, text, error = run(capsys, "edit", source, "add a hat", *options)
    assert error == ""
    # 160 x 128 at the area of 128 x 128, rounded to multiples of 32 pixels: 8 x 8 tokens (and as many of the source)
    assert code == 0 and "run at 128 x 128" in text and texts == [("add a hat", 1), (" ", 1)]
    assert "(plain: 128)" in text and "50 steps" in text and "32 of 64 tokens" in text
    lone = np.array(PIL.Image.open(out))
    code, text, _ = run(capsys, "edit", source, "add a hat", *options, "--reference", other)
    assert code == 0 and "run at 128 x 128" in text and texts[2:] == [("add a hat", 2), (" ", 2)]
    # 10 x 6 tokens of the further picture
    assert "(plain: 188)" in text and not (np.array(PIL.Image.open(out)) == lone).all()
    assert run(capsys, "edit", source, "add a hat", *options, "--true-cfg-scale", "1", "--preset", "4")[0] == 0
    assert texts[4:] == [("add a hat", 1)]


def test_settings_of_a_folder(tmp_path):
    flux, plus = "FluxKontextPipeline", "QwenImageEditPlusPipeline"
    assert models.model_settings(tmp_path, flux) == {"true_cfg_scale": 1.0}
    assert models.model_settings(tmp_path, flux, 2.0) == {"true_cfg_scale": 2.0, "negative_prompt": ""}
    assert models.model_settings(tmp_path, plus) == {"true_cfg_scale": 4.0, "negative_prompt": " "}
    (tmp_path / "specedit.json").write_text('{"true_cfg_scale": 1, "resolution": 64, "max_sequence_length": 8}')
    distilled = {"true_cfg_scale": 1.0, "max_area": 4096, "max_sequence_length": 8}
    assert models.model_settings(tmp_path, plus) == distilled
    assert models.model_settings(tmp_path, flux) == {**distilled, "_auto_resize": False}
    assert models.model_settings(tmp_path, plus, 3.0)["true_cfg_scale"] == 3.0


@pytest.mark.slow
def test_edit_says_when_nothing_changes(capsys, tmp_path, model, source):
    out = tmp_path / "same.png"
    options = ("--model", model, "--device", "cpu", "--threshold", 4, "--draft", "quarter")
    for size in ("source", "working"):
        code, text, _ = run(capsys, "edit", source, "add a hat", "-o", out, *options, "--output-size", size)
        assert code == 0 and "nothing changes: the source is returned" in text
        expected = PIL.Image.open(source)
        expected = expected if size == "source" else expected.resize((128, 96), PIL.Image.LANCZOS)
        assert (np.array(PIL.Image.open(out)) == np.array(expected)).all()


@pytest.mark.slow
def test_edit_at_the_working_size(capsys, tmp_path, model, source):
    out = tmp_path / "edited.png"
    options = ("--model", model, "--device", "cpu", "--mask", half(tmp_path), "--output-size", "working")
    code, text, _ = run(capsys, "edit", source, "add a hat", "-o", out, *options)
    edited, overlay = PIL.Image.open(out), PIL.Image.open(out.with_name("mask.png"))
    assert code == 0 and edited.size == (128, 96) and overlay.size == (160, 128) and "run at" not in text
    expected = np.array(PIL.Image.open(source).resize((128, 96), PIL.Image.LANCZOS))
    assert (np.array(edited)[:, 64 + 8 :] == expected[:, 64 + 8 :]).all()
    assert not (np.array(edited)[:, :64] == expected[:, :64]).all()


@pytest.mark.slow
@pytest.mark.parametrize("channels, kind, profile", [
    (1, np.uint8, False), (2, np.uint16, False), (3, np.uint16, True), (4, np.uint8, True), (4, np.uint16, False),
], ids=str)  # fmt: skip
def test_outside_the_edit_every_bit_is_the_sources(capsys, tmp_path, model, channels, kind, profile):
    """Any mode, any depth, a colour profile that is not sRGB: at the source's own size."""
    from test_files import LINEAR

    shape = (150, 210) if channels == 1 else (150, 210, channels)
    array = np.random.default_rng(0).integers(0, np.iinfo(kind).max + 1, shape).astype(kind)
    Photo(array, LINEAR if profile else None).save(tmp_path / "a.tif")
    array = Photo.open(tmp_path / "a.tif").array
    options = ("--model", model, "--device", "cpu", "--mask", half(tmp_path), "--steps", 4)
    assert run(capsys, "edit", tmp_path / "a.tif", "add a hat", "-o", tmp_path / "o.tif", *options)[0] == 0
    found = Photo.open(tmp_path / "o.tif")
    assert found.array.dtype == kind and found.array.shape == array.shape
    assert found.profile == (LINEAR if profile else None)
    assert np.array_equal(found.array[:, 105 + 16 :], array[:, 105 + 16 :])
    assert not np.array_equal(found.array[:, :105], array[:, :105])
    if array.ndim == 3 and array.shape[2] in (2, 4):
        assert np.array_equal(found.alpha, array[..., -1])


@pytest.mark.slow
def test_mask_finds_what_changed(capsys, tmp_path, model, source):
    picture = PIL.Image.open(source)
    edited = tmp_path / "edited.jpg"
    changed = picture.copy()
    changed.paste((255, 0, 0), (96, 32, 128, 64))
    changed.resize((320, 256)).save(edited, quality=95)
    out = tmp_path / "heat.png"
    options = ("--vae", model, "--device", "cpu", "--metric", "latent", "--threshold", 0.02)
    code, text, _ = run(capsys, "mask", source, edited, "-o", out, *options)
    assert code == 0 and "10 x 8" not in text and "8 x 10 tokens of 16 pixels" in text
    assert "320 x 256 for 160 x 128; no drift" in text
    assert PIL.Image.open(out).size == (160, 128)
    code, text, _ = run(capsys, "mask", source, source, "-o", out, *options)
    assert code == 0 and "changed     0 of 80 tokens" in text
    assert "texture     fine detail 1.00 of the source's" in text and "over twice in 0.0 %" in text


@pytest.mark.slow
@pytest.mark.parametrize("kind, low, high", [("blurred", 0, 0.5), ("sharpened", 1.5, 9), ("flat", None, None)])
def test_mask_tells_texture(capsys, tmp_path, model, kind, low, high):
    from PIL import ImageFilter
    from test_align import scene

    array = np.full((288, 320, 3), 90, np.uint8)
    if kind != "flat":
        array = scene(0, (320, 288)) * 0.8 + np.random.default_rng(0).normal(20, 8, (288, 320, 1))
    picture = PIL.Image.fromarray(array.clip(0, 255).astype(np.uint8))
    picture.save(tmp_path / "a.png")
    found = {"blurred": ImageFilter.GaussianBlur(1.5), "sharpened": ImageFilter.UnsharpMask(2, 200, 0)}
    (picture.filter(found[kind]) if kind in found else picture).save(tmp_path / "b.png")
    # all that the score would say is over this
    options = ("-o", tmp_path / "h.png", "--vae", model, "--device", "cpu", "--threshold", 4)
    code, text, _ = run(capsys, "mask", tmp_path / "a.png", tmp_path / "b.png", *options)
    assert code == 0 and "changed     0 of 360 tokens" in text
    if low is None:
        assert "texture     no fine detail in unchanged tokens" in text
    else:
        assert low < float(re.search(r"fine detail (\S+) of", text)[1]) < high


def test_a_pairs_threshold_follows_what_lies_between_its_pictures():
    import torch

    def of(quiet, edited=0.3):
        scores = torch.full((1, 100), quiet)
        scores[:, :20] = edited
        return mask.pair_threshold(scores, 0.14)

    assert of(0.0) == of(0.004) == 0.05 and of(0.009) == pytest.approx(0.09) and of(0.02) == 0.14
    # an edit of most of the picture, and none that is seen
    assert mask.pair_threshold(torch.full((1, 100), 1.0), 0.14) == 0.14
    assert mask.pair_threshold(torch.empty(1, 0), 0.14) == 0.14


def marked(text):
    return int(text.split("changed     ")[1].split(" of")[0])


@pytest.mark.slow
def test_mask_undoes_a_drift(capsys, tmp_path, model):
    """Shifted, zoomed, cropped, recoloured by a profile: only what was edited is marked."""
    from test_align import moved, scene
    from test_files import LINEAR

    size = (320, 288)
    source = scene(0, size)
    edited = source.copy()
    edited[96:144, 128:192] = (255, 0, 0)
    PIL.Image.fromarray(source).save(tmp_path / "a.png")
    options = ("-o", tmp_path / "h.png", "--vae", model, "--device", "cpu", "--metric", "latent", "--threshold", 0.1)

    def run_on(picture, *more, **how):
        if not isinstance(picture, PIL.Image.Image):
            picture = PIL.Image.fromarray(picture)
        picture.save(tmp_path / "b.png", **how)
        code, text, _ = run(capsys, "mask", tmp_path / "a.png", tmp_path / "b.png", *options, *more)
        assert code == 0 and PIL.Image.open(tmp_path / "h.png").size == size
        return text

    own = run_on(edited)
    assert "no drift" in own and "left out" not in own and marked(own) >= 12
    text = run_on(moved(edited, 6, -4, 1.01))
    assert "placed      moved +6." in text and "undone" in text and "left out    " in text
    assert abs(marked(text) - marked(own)) <= 8
    text = run_on(moved(edited, 6, -4, 1.01), "--no-align")
    assert "placed" not in text and marked(text) > 2 * marked(own)
    # another aspect: a crop is found where it was taken; without alignment it is said to be stretched
    crop = PIL.Image.fromarray(edited[8:-8])
    text = run_on(crop)
    assert "320 x 272 for 320 x 288, of another aspect (5.9 %): cropped" in text
    assert abs(marked(text) - marked(own)) <= 8
    assert "of another aspect (5.9 %): stretched, as --no-align asks" in run_on(crop, "--no-align")
    # another scene
    text = run_on(scene(1, size))
    assert "no drift could be estimated" in text and "perhaps the whole scene changed" in text
    # the same picture in another colour space
    linear = Photo(source, LINEAR).with_picture(PIL.Image.fromarray(source)).array
    assert marked(run_on(linear, "--no-align", icc_profile=LINEAR)) == 0 < marked(run_on(linear, "--no-align"))


@pytest.mark.slow
def test_mask_takes_a_tiny_autoencoders_files(capsys, tmp_path, source):
    """Weights of random values in the structure of FLUX.2's tiny autoencoder."""
    import torch

    torch.manual_seed(0)

    def block(i, pooled):
        found = {f"{i}.conv.{j}.{k}": torch.randn(8, 8, 3, 3) / 8 if k == "weight" else torch.zeros(8)
                 for j in (0, 2, 4) for k in ("weight", "bias")}  # fmt: skip
        if pooled:
            found |= {f"{i}.pool.0.weight": torch.randn(32, 8, 1, 1) / 3, f"{i}.pool.1.weight": torch.ones(32),
                      f"{i}.pool.1.bias": torch.zeros(32),
                      f"{i}.pool.3.weight": torch.randn(8, 32, 1, 1) / 6}  # fmt: skip
        return found

    def conv(i, into, out, bias=True):
        found = {f"{i}.weight": torch.randn(out, into, 3, 3) / (3 * into**0.5)}
        return found | ({f"{i}.bias": torch.zeros(out)} if bias else {})

    encoder = conv(0, 3, 8) | block(1, False)
    decoder = conv(1, 4, 8) | block(3, True)
    for i in (2, 4, 6):
        encoder |= conv(i, 8, 8, False) | block(i + 1, i == 6)
        decoder |= conv(i + 3, 8, 8, False) | block(i + 4, False)
    encoder, decoder = encoder | conv(8, 8, 4), decoder | conv(11, 8, 3)
    torch.save(encoder, tmp_path / "tiny_encoder.pth")
    torch.save(decoder, tmp_path / "tiny_decoder.pth")
    out = tmp_path / "heat.png"
    code, text, _ = run(capsys, "mask", source, source, "-o", out, "--vae", tmp_path, "--device", "cpu")
    assert code == 0 and "8 x 10 tokens of 16 pixels" in text and "changed     0 of 80 tokens" in text
    picture = PIL.Image.open(source)
    picture.paste((255, 0, 0), (64, 32, 96, 64))
    picture.save(tmp_path / "b.png")
    code, text, _ = run(capsys, "mask", source, tmp_path / "b.png", "-o", out, "--vae", tmp_path, "--device", "cpu")
    assert code == 0 and marked(text) >= 4
    decoder["3.conv.0.weight"] = torch.full((8, 8, 3, 3), float("nan"))
    torch.save(decoder, tmp_path / "tiny_decoder.pth")
    wrong = fails(capsys, "mask", source, source, "-o", out, "--vae", tmp_path, "--device", "cpu")
    assert "the VAE cannot be loaded: tiny_decoder.pth: not finite" in wrong


@pytest.mark.slow
def test_detail_at_the_pictures_own_resolution(capsys, tmp_path, model):
    large = tmp_path / "large.png"
    tiny_image(300, 420).save(large)
    options = ("edit", large, "add a hat", "-o", tmp_path / "out.png", "--model", model, "--steps", 4)
    options += ("--box", "30,30,90,90", "--detail", "native")
    code, text, _ = run(capsys, *options)
    assert code == 0 and re.search(r"native      \d of .* steps from sigma 0\.6", text)
    assert len(re.findall(r"\d+ x native", text)) == 1  # windows differ in their tokens
    x0, y0, x1, y1 = map(int, re.search(r"within      (\d+),(\d+),(\d+),(\d+) of", text).groups())
    changed = (np.array(PIL.Image.open(tmp_path / "out.png")) != np.array(PIL.Image.open(large))).any(axis=-1)
    assert changed[y0:y1, x0:x1].sum() == changed.sum() > 0 and (x1 - x0) * (y1 - y0) < changed.size
    for wrong in (("--output-size", "working"), ("--method", "flash")):
        code, _, error = run(capsys, *options, *wrong)
        assert code == 2 and "--detail native: expected with --output-size source and --method specedit" in error


@pytest.mark.slow
def test_a_photograph_of_24_megapixels_within_3_gigabytes(tmp_path, model):
    """A JPEG file with an orientation, tiles of a photograph: everything that a user's camera gives."""
    tile = np.asarray(PIL.Image.open(PHOTO).convert("RGB").resize((1000, 1000), PIL.Image.Resampling.BICUBIC))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    path, out = tmp_path / "photo.jpg", tmp_path / "out.png"
    PIL.Image.fromarray(np.tile(tile, (4, 6, 1))).save(path, quality=90, exif=exif)
    code = (
        "import resource, sys; from specedit_kernels.cli import main; code = main(sys.argv[1:]); "
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024); sys.exit(code)"
    )
    options = ["-o", out, "--model", model, "--device", "cpu", "--box", "10%,20%,30%,40%", "--detail", "native"]
    done = subprocess.run(
        [sys.executable, "-c", code, "edit", path, "add a hat", *options], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("peak ")[1]) < 3e9
    before, after = Photo.open(path), Photo.open(out)
    assert after.size == before.size == (4000, 6000)
    x0, y0, x1, y1 = map(int, re.search(r"within      (\d+),(\d+),(\d+),(\d+) of", done.stdout).groups())
    changed = (before.array != after.array).any(axis=-1)
    assert changed[y0:y1, x0:x1].sum() == changed.sum() > 0.02 * changed.size and changed.mean() < 0.3


@pytest.mark.slow
def test_a_preview_writes_the_overlay_alone(capsys, tmp_path, model, source):
    out = tmp_path / "o.png"
    options = ("-o", out, "--model", model, "--device", "cpu", "--preview")
    code, text, _ = run(capsys, "edit", source, "add a hat", *options)
    assert code == 0 and "edited      nothing: a preview" in text and "steps       4;" in text and not out.exists()
    assert PIL.Image.open(tmp_path / "mask.png").size == (160, 128)
    more = ("--box", "0,0,50%,100%", "--mask-mode", "add")
    code, added, _ = run(capsys, "edit", source, "add a hat", *options, *more)
    tokens = [int(t.split("mask.png: ")[1].split(" of")[0]) for t in (text, added)]
    assert code == 0 and tokens[1] >= max(tokens[0], 24)
    assert "--mask-mode limit: expected with" in fails(
        capsys, "edit", source, "add a hat", *options, "--mask-mode", "limit"
    )
    assert "--preserve none: expected with --output-size working" in fails(
        capsys, "edit", source, "add a hat", "-o", out, "--model", model, "--preserve", "none"
    )
    # a mask is the region without a step
    code, text, _ = run(capsys, "edit", source, "add a hat", *options, "--mask", half(tmp_path))
    assert code == 0 and "steps       0;" in text and "0.0 % of one with" in text and "with 0 steps" not in text


@pytest.mark.slow
def test_mask_takes_a_vae_folder(capsys, tmp_path, model, qwen, source):
    out = tmp_path / "heat.png"
    for folder in (model / "vae", qwen / "vae", qwen):
        code, text, _ = run(capsys, "mask", source, source, "-o", out, "--vae", folder, "--device", "cpu")
        assert code == 0 and "8 x 10 tokens of 16 pixels" in text and "changed     0 of 80 tokens" in text


def test_heat_map_marks_the_scores():
    import torch

    scores = torch.zeros(4, 4)
    scores[1, 2] = 2.0
    for height, width in ((64, 64), (101, 203)):  # a source of another size than what is scored
        array = mask.heat_map(np.full((height, width, 3), 128, np.uint8), scores, 0.1).astype(int)
        assert array.shape == (height, width, 3)
        top, bottom, left, right = (-(-n * side // 4) for n, side in ((1, height), (2, height), (2, width), (3, width)))
        assert (array[top:bottom, left:right, 0] > 190).all()
        array[top:bottom, left:right] = array[0, 0]
        assert (array == array[0, 0]).all() and abs(array[0, 0] - 128).max() <= 1


def test_inputs_are_not_written_over(capsys, tmp_path, model, source):
    """The overlay's default name, mask.png, is one that a user's own mask may have."""
    own = half(tmp_path).rename(tmp_path / "mask.png")
    before = own.read_bytes()
    text = fails(capsys, "edit", source, "add a hat", "-o", tmp_path / "o.png", "--model", model, "--mask", own)
    assert "mask.png: is an input" in text and own.read_bytes() == before
    assert "is an input" in fails(capsys, "edit", own, "add a hat", "-o", own, "--model", model)
    assert "is an input" in fails(capsys, "mask", own, source, "-o", own)
    assert not (tmp_path / "o.png").exists()


def test_wrong_pictures(capsys, tmp_path, model, source):
    def edit(path):
        return fails(capsys, "edit", path, "add a hat", "-o", tmp_path / "o.png", "--model", model)

    assert "no such file" in edit(tmp_path / "none.png")
    assert "expected a folder for the results" in edit(tmp_path)  # as a folder of pictures
    assert "not a file" in edit("/dev/null")
    text = tmp_path / "text.png"
    text.write_text("no picture")
    assert "not a picture" in edit(text)
    for suffix in ("png", "jpg"):
        whole = tmp_path / f"whole.{suffix}"
        PIL.Image.effect_noise((64, 64), 50).convert("RGB").save(whole)
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        assert "damaged or truncated" in edit(cut)
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    assert "not a picture" in edit(empty)
    assert not (tmp_path / "o.png").exists() and not (tmp_path / "mask.png").exists()
    assert "no such file" in fails(capsys, "mask", source, tmp_path / "none.png", "-o", tmp_path / "heat.png")


def test_wrong_outputs(capsys, tmp_path, model, source):
    edit = lambda out: fails(capsys, "edit", source, "add a hat", "-o", out, "--model", model)  # noqa: E731
    assert "ends in one of" in edit(tmp_path / "out.txt")
    assert "no such folder" in edit(tmp_path / "none" / "out.png")
    (tmp_path / "folder.png").mkdir()
    assert "is a folder" in edit(tmp_path / "folder.png")
    assert "have one name" in edit(tmp_path / "mask.png")


def test_the_qualities_are_the_configs():
    from specedit_kernels.cli.main import DRAFTS, PRESETS, QUALITIES
    from specedit_kernels.engine import config

    assert DRAFTS == config.DRAFTS
    assert QUALITIES == tuple(config.QUALITIES) and sorted(PRESETS) == sorted(config.PRESETS)


def test_wrong_options(capsys, source):
    assert "--preset: invalid choice" in fails(capsys, "edit", source, "add a hat", "--preset", "10")
    assert "--draft: invalid choice" in fails(capsys, "edit", source, "add a hat", "--draft", "third")
    assert "instruction: expected a text" in fails(capsys, "edit", source, "  ")
    assert "required" in fails(capsys, "edit")
    assert "required" in fails(capsys)
    assert "invalid choice" in fails(capsys, "paint")
    assert "--seed: invalid" in fails(capsys, "edit", source, "add a hat", "--seed", 2**64)
    for command in (("edit", source, "add a hat"), ("mask", source, source)):
        assert "--threshold: invalid" in fails(capsys, *command, "--threshold", "nan")
        assert "expected cpu or cuda" in fails(capsys, *command, "--device", "meta")


def test_wrong_models_and_devices(capsys, tmp_path, model, source):
    def edit(folder, *more):
        return fails(capsys, "edit", source, "add a hat", "-o", tmp_path / "o.png", "--model", folder, *more)

    assert "no such model folder" in edit(tmp_path / "none")
    assert "no such model folder" in edit("tiny_none")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "it has no model_index.json" in edit(empty)
    (empty / "model_index.json").write_text("{")
    assert "model_index.json cannot be read" in edit(empty)
    (empty / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert "a StableDiffusionPipeline; expected FluxKontextPipeline" in edit(empty)
    assert "QwenImageEditPipeline, QwenImageEditPlusPipeline" in edit(empty)
    assert "FluxKontextPipeline, which takes one picture" in edit(model, "--reference", source)
    (empty / "config.json").write_text('{"_class_name": "AutoencoderDC"}')
    odd = fails(capsys, "mask", source, source, "-o", tmp_path / "h.png", "--vae", empty)
    assert "a AutoencoderDC; expected AutoencoderKL" in odd
    (empty / "config.json").unlink()
    shutil.copy(model / "model_index.json", empty)
    assert "the model cannot be loaded: has no " in edit(empty)
    assert "--device nothing" in edit(model, "--device", "nothing")
    assert "steps: expected at least 3" in edit(model, "--steps", "1")
    assert "VAE" in fails(capsys, "mask", source, source, "-o", tmp_path / "h.png", "--vae", empty)


def test_a_backend_that_cannot_serve(capsys, tmp_path, model, source, monkeypatch):
    options = ("-o", tmp_path / "o.png", "--model", model, "--device", "cpu")
    monkeypatch.setenv("SPECEDIT_BACKEND", "cuda")
    assert "SPECEDIT_BACKEND=cuda cannot serve" in fails(capsys, "edit", source, "add a hat", *options)
    monkeypatch.setenv("SPECEDIT_BACKEND", "fast")
    assert "SPECEDIT_BACKEND: expected one of" in fails(capsys, "edit", source, "add a hat", *options)


def test_doctor_names_every_op(capsys):
    from specedit_kernels import ops

    code, text, _ = run(capsys, "doctor")
    assert code == 0 and all(op in text for op in ops.names())


@pytest.mark.slow
def test_help_does_not_load_the_pipelines():
    code = (
        "import sys; from specedit_kernels.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'diffusers', 'transformers', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("edit", "mask", "doctor"))


def test_shipped_models_have_names(tmp_path, monkeypatch):
    """A name is a shipped folder's, unless a folder of that name stands here; a path is itself."""
    monkeypatch.chdir(tmp_path)
    assert models.model_folder("tiny_kontext") == models.model_folder(None) == models.SHIPPED_MODEL
    for absent in (tmp_path / "tiny_kontext", "elsewhere", "n" * 300, "a\0b"):
        with pytest.raises(UserError):
            models.model_folder(absent)
    (tmp_path / "tiny_kontext").mkdir()
    assert models.model_folder("tiny_kontext") == Path("tiny_kontext")


def test_an_installation_without_checkpoints(capsys, tmp_path, source, monkeypatch):
    monkeypatch.setattr(models, "SHIPPED_MODEL", tmp_path / "none")
    error = fails(capsys, "edit", source, "add a hat", "-o", tmp_path / "o.png")
    assert "--model: this installation has no checkpoint" in error
    error = fails(capsys, "mask", source, source, "-o", tmp_path / "o.png")
    assert "--vae: this installation has no checkpoint" in error


def test_the_version(capsys):
    from specedit_kernels import __version__

    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"specedit {__version__}\n"


# model folders


@pytest.fixture
def copy(model, tmp_path):
    """A copy of the model folder that a test may damage."""
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    return folder


def tensors(folder, part, change):
    """Change the tensors of a component's first file."""
    from safetensors.torch import load_file, save_file

    path = sorted((folder / part).glob("*.safetensors"))[0]
    held = load_file(path)
    change(held, sorted(held)[0])
    save_file(held, path, metadata={"format": "pt"})


def edit_fails(capsys, folder, source):
    out = source.with_name("o.png")
    error = fails(capsys, "edit", source, "add a hat", "-o", out, "--model", folder, "--device", "cpu", "--steps", 4)
    assert not out.exists()
    return error


PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


@pytest.mark.parametrize("part", [*PARTS, "scheduler", "tokenizer", "tokenizer_2"])
def test_a_component_that_is_gone(capsys, copy, source, part):
    shutil.rmtree(copy / part)
    assert f"has no {part}\n" in edit_fails(capsys, copy, source)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_weights_that_are_not_the_models(capsys, copy, source, part):
    whole = sorted((copy / part).glob("*.safetensors"))[0].read_bytes()

    def again(change):
        sorted((copy / part).glob("*.safetensors"))[0].write_bytes(whole)
        tensors(copy, part, change)
        return edit_fails(capsys, copy, source)

    assert f"{part}: lacks the tensor" in again(lambda held, key: held.pop(key))
    assert f"{part}: not finite: " in again(lambda held, key: held[key].view(-1)[:1].fill_(float("nan")))


def test_an_index_that_names_more_than_its_files_have(capsys, copy, source):
    """diffusers takes the index at its word: nothing of its own says that a tensor is absent."""
    from diffusers import FluxTransformer2DModel

    whole = FluxTransformer2DModel.from_pretrained(copy / "transformer")
    shutil.rmtree(copy / "transformer")
    whole.save_pretrained(copy / "transformer", max_shard_size="20KB")
    assert len(list((copy / "transformer").glob("*.safetensors"))) > 1
    tensors(copy, "transformer", lambda held, key: held.pop(key))
    assert "transformer: lacks the tensor" in edit_fails(capsys, copy, source)


@pytest.mark.skipif(not models.SHIPPED_MODEL.is_dir(), reason="no shipped checkpoint")
def test_a_tokenizer_without_its_words(capsys, tmp_path, source):
    """transformers makes an empty tokenizer of the class."""
    shutil.copytree(models.SHIPPED_MODEL, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer_2" / "tokenizer.json").unlink()
    assert "tokenizer_2: has no tokenizer.json" in edit_fails(capsys, tmp_path / "copy", source)


@pytest.mark.parametrize("text", [
    '{"resolution": 1e400}', '{"resolution": NaN}', '{"resolution": "wide"}', '{"resolution": true}', "[]", "{",
    '{"max_sequence_length": 0}', '{"true_cfg_scale": 1e400}', "[" * 100_000,
])  # fmt: skip
def test_settings_that_cannot_be(capsys, copy, source, text):
    (copy / "specedit.json").write_text(text)
    assert "specedit.json: " in edit_fails(capsys, copy, source)


@pytest.mark.slow
def test_errors_of_the_run_are_one_line(capsys, copy, source):
    (copy / "specedit.json").write_text('{"resolution": 128, "max_sequence_length": 600}')
    assert "`max_sequence_length` cannot be greater than 512" in edit_fails(capsys, copy, source)
    with pytest.raises(ValueError, match="max_sequence_length"):
        main(["edit", str(source), "add a hat", "-o", str(source.with_name("o.png")), "--model", str(copy),
              "--device", "cpu", "--traceback"])  # fmt: skip
    (copy / "specedit.json").write_text('{"resolution": 128, "max_sequence_length": 16}')
    path = copy / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_shift": "x"}))
    assert "the edit failed: " in edit_fails(capsys, copy, source)
    path.write_text(json.dumps(config | {"base_shift": float("nan")}))
    assert "scheduler: base_shift is nan" in edit_fails(capsys, copy, source)


@pytest.mark.slow
def test_a_prompt_that_is_cut_is_said(capsys, tmp_path, model, source):
    options = ("-o", tmp_path / "o.png", "--model", model, "--device", "cpu", "--mask", half(tmp_path), "--steps", 4)
    code, text, _ = run(capsys, "edit", source, "add a hat " * 40, *options)
    assert code == 0 and "note        the instruction is cut: the model reads its first 16 tokens" in text
    code, text, _ = run(capsys, "edit", source, "hat", *options)
    assert code == 0 and "is cut" not in text


@pytest.mark.slow
def test_boxes_say_where(capsys, tmp_path, model, source):
    """The source has 160 x 128 pixels, the run 8 x 6 tokens, of which blocks of 2 x 2 are edited."""
    options = ("-o", tmp_path / "o.png", "--model", model, "--device", "cpu", "--steps", 4)
    for boxes, tokens in (
        (["0,0,80,128"], 24), (["0,0,50%,100%"], 24), (["0,0,1,1"], 4),
        (["0,0,40,43"], 8), (["0%,0%,12.5%,100%", "140,0,9999,128"], 24),
    ):  # fmt: skip
        more = [word for box in boxes for word in ("--box", box)]
        code, text, _ = run(capsys, "edit", source, "add a hat", *options, *more)
        assert code == 0 and f"{tokens} of 48 tokens" in text
    code, text, _ = run(
        capsys, "edit", source, "add a hat", *options, "--mask", half(tmp_path), "--box", "140,0,160,64"
    )
    assert code == 0 and "32 of 48 tokens" in text
    for box in ("1,2,3", "a,b,c,d", "0,0,nan,1", "-1,0,5,5", "0,0,inf,1"):
        assert "--box: invalid" in fails(capsys, "edit", source, "add a hat", *options, f"--box={box}")
    for box in ("50,50,50,60", "160,0,170,128", "9,9,8,8"):
        assert f"--box {box}: selects nothing of 160 x 128" in fails(
            capsys, "edit", source, "add a hat", *options, f"--box={box}"
        )


# many pictures


@pytest.fixture
def many(tmp_path):
    """A folder with two pictures of one stem, a damaged one, and what is no picture."""
    folder = tmp_path / "many"
    folder.mkdir()
    tiny_image(128, 128).save(folder / "a.png")
    tiny_image(128, 128, seed=1).convert("P").save(folder / "a.gif")
    (folder / "b.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.mark.slow
def test_a_folder_of_pictures(capsys, tmp_path, model, many, monkeypatch):
    out = tmp_path / "out"
    options = ("-o", out, "--model", model, "--device", "cpu", "--mask", half(tmp_path), "--steps", 4)
    code, text, error = run(capsys, "edit", many, "add a hat", *options)
    assert code == 2 and error.count("\n") == 1 and "b.png: not a picture" in error
    assert "2 of 3 pictures" in text and "failed      1" in text
    names = ["a.gif.png", "a.png"]
    assert sorted(p.name for p in out.iterdir()) == sorted(n + end for n in names for end in ("", ".json", ".mask.png"))
    result = json.loads((out / "a.png.json").read_text())
    assert result["instruction"] == "add a hat" and result["edited_share"] == 0.5 and result["flops"] > 0
    assert "palette" in json.loads((out / "a.gif.png.json").read_text())["notes"][0]

    # again: what is finished is skipped, the rest is tried
    before = {name: (out / name).stat().st_mtime_ns for name in names}
    tiny_image(128, 128, seed=2).save(many / "b.png")
    code, text, _ = run(capsys, "edit", many, "add a hat", *options)
    assert code == 0 and "1 of 3 pictures" in text and "skipped     2" in text
    assert {name: (out / name).stat().st_mtime_ns for name in names} == before
    # all finished: no model is loaded
    monkeypatch.setattr(models, "load_pipeline", None)
    assert "0 of 3 pictures" in run(capsys, "edit", many, "add a hat", *options)[1]
    monkeypatch.undo()
    # another instruction is another result; so is one whose picture is gone
    (out / "b.png").unlink()
    assert "1 of 3 pictures" in run(capsys, "edit", many, "add a hat", *options)[1]
    assert "3 of 3 pictures" in run(capsys, "edit", many, "add a cat", *options)[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_list_of_pictures(capsys, tmp_path, model, many, kind):
    rows = [{"image": "a.png", "instruction": "add a hat", "seed": 1, "output": "hat.tif"},
            {"image": "a.png", "instruction": "", "seed": "", "output": ""},
            {"image": "a.png", "instruction": "add a \u00e9clair", "seed": 2, "output": ""}]  # fmt: skip
    path = many / f"list.{kind}"
    if kind == "csv":
        lines = [",".join(rows[0])] + [",".join(str(v) for v in row.values()) for row in rows]
    else:
        lines = [json.dumps({k: v for k, v in row.items() if v != ""}) for row in rows] + [""]
    path.write_text("\n".join(lines), encoding="utf-8")
    options = ("-o", tmp_path / "out", "--model", model, "--device", "cpu", "--mask", half(tmp_path), "--steps", 4)
    code, text, error = run(capsys, "edit", path, "add a cat", *options)
    assert code == 0 and error == "" and "3 of 3 pictures" in text
    found = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text())
             for name in ("hat.tif", "a.png", "a-2.png")}  # fmt: skip
    assert [r["instruction"] for r in found.values()] == ["add a hat", "add a cat", "add a \u00e9clair"]
    assert [r["seed"] for r in found.values()] == [1, 0, 2]
    assert Photo.open(tmp_path / "out" / "hat.tif").size == (128, 128)


def test_lists_and_folders_that_cannot_be(capsys, tmp_path, model, many):
    def listed(text, name="list.jsonl"):
        (many / name).write_text(text)
        return fails(capsys, "edit", many / name, "-o", tmp_path / "out", "--model", model)

    assert "line 1: expected a JSON object" in listed("[1]")
    assert "line 2: image: expected a text, got none" in listed('{"image": "a.png", "instruction": "x"}\n{}')
    assert "instruction: expected a text, got none" in listed('{"image": "a.png"}')
    assert "got 'prompt'" in listed('{"image": "a.png", "prompt": "x"}')
    assert "seed: expected a whole number" in listed('{"image": "a.png", "instruction": "x", "seed": "one"}')
    for name in ("../a.png", "a.gif"):
        assert "output: expected" in listed(json.dumps({"image": "a.png", "instruction": "x", "output": name}))
    assert "other fields than the first" in listed("image,instruction\na.png\n", "list.csv")
    assert "has no pictures" in listed("image,instruction\n", "list.csv")
    edit = lambda *more: fails(capsys, "edit", many, "add a hat", "--model", model, *more)  # noqa: E731
    assert "--output: expected a folder" in edit()
    assert "not that of the pictures" in edit("-o", many)
    assert "expected a folder for the results" in edit("-o", many / "a.png")
    assert "--mask-output: expected none" in edit("-o", tmp_path / "out", "--mask-output", tmp_path / "m.png")
    assert "instruction: expected a text, got none" in fails(capsys, "edit", many, "-o", tmp_path / "out")
    assert "instruction: expected a text, got none" in fails(capsys, "edit", many / "a.png", "-o", tmp_path / "o.png")
    assert not (tmp_path / "out").exists()


# what comes in


def test_names_and_prompts_that_no_system_takes(capsys, tmp_path, model, source):
    options = ("-o", tmp_path / "o.png", "--model", model)
    assert "name too long" in fails(capsys, "edit", tmp_path / ("n" * 300 + ".png"), "add a hat", *options)
    assert "cannot be read" in fails(capsys, "edit", "a\0b.png", "add a hat", *options)
    assert "expected a text in UTF-8" in fails(capsys, "edit", source, "add a \udcff hat", *options)
    assert "\\udcff.png: no such file" in fails(capsys, "edit", "\udcff.png", "add a hat", *options)
    assert fails(capsys, "edit", "two\nlines.png", "add a hat", *options).count("\n") == 1


@pytest.mark.slow
def test_the_mask_is_read_by_the_rule_of_python(capsys, tmp_path, model, source):
    """White but transparent: not selected; 16 bits: over one half of 65535."""
    clear = np.zeros((128, 160, 4), np.uint8)
    clear[..., :3] = 255
    clear[:, :80, 3] = 255
    deep = np.full((128, 160), 32767, np.uint16)
    deep[:, :80] = 32768
    for i, array in enumerate((clear, deep)):
        path = tmp_path / f"mask{i}.png"
        Photo(array).save(path)
        options = ("-o", tmp_path / "o.png", "--model", model, "--device", "cpu", "--steps", 4, "--mask", path)
        code, text, _ = run(capsys, "edit", source, "add a hat", *options)
        assert code == 0 and "24 of 48 tokens" in text


# what goes out


@pytest.mark.slow
def test_the_pictures_own_ways_are_kept(capsys, tmp_path, model, source):
    """Colour profile, metadata, greys of 16 bits."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = PIL.Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", 6
    PIL.Image.open(source).save(tmp_path / "a.png", icc_profile=profile, exif=exif, dpi=(300, 300))
    Photo(np.asarray(PIL.Image.open(source).convert("L")).astype(np.uint16) * 257).save(tmp_path / "b.png")
    options = ("--model", model, "--device", "cpu", "--steps", 4, "--mask", half(tmp_path))
    code, text, _ = run(capsys, "edit", tmp_path / "a.png", "add a hat", "-o", tmp_path / "o.tif", *options)
    found = Photo.open(tmp_path / "o.tif")
    assert code == 0 and "note        turned upright by its EXIF orientation" in text
    assert found.profile == profile and found.dpi == pytest.approx((300, 300), abs=0.01) and found.size == (128, 160)
    kept = PIL.Image.Exif()
    kept.load(found.exif)
    assert dict(kept) == {0x010F: "Maker"}
    code, text, _ = run(capsys, "edit", tmp_path / "b.png", "add a hat", "-o", tmp_path / "o.png", *options)
    found = Photo.open(tmp_path / "o.png")
    assert code == 0 and found.array.dtype == np.uint16 and found.array.ndim == 2
    code, text, _ = run(capsys, "edit", source, "add a hat", "-o", tmp_path / "o.jpg", *options)
    assert code == 0 and "note        JPEG encodes every pixel again" in text


def test_places_are_tried_before_the_work(capsys, tmp_path, model, source):
    edit = lambda out: fails(capsys, "edit", source, "add a hat", "-o", out, "--model", model)  # noqa: E731
    assert "name too long" in edit(tmp_path / ("n" * 252 + ".png"))
    (tmp_path / "old.png").write_bytes(b"old")
    (tmp_path / "old.png").chmod(0o444)
    assert "old.png: is read-only" in edit(tmp_path / "old.png") and (tmp_path / "old.png").read_bytes() == b"old"
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert "loop.png: " in edit(tmp_path / "loop.png")
    (tmp_path / "device.png").symlink_to("/dev/null")
    assert "is a device" in edit(tmp_path / "device.png")
    assert not (tmp_path / "mask.png").exists()


@pytest.mark.slow
def test_long_names_and_links_are_written(capsys, tmp_path, model, source):
    options = ("--model", model, "--device", "cpu", "--steps", 4, "--mask", half(tmp_path))
    (tmp_path / "far").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "far" / "target.png")
    for out in (tmp_path / ("n" * 251 + ".png"), tmp_path / "link.png"):
        assert run(capsys, "edit", source, "add a hat", "-o", out, *options)[0] == 0
        assert PIL.Image.open(out).size == (160, 128)
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "far" / "target.png").is_file()


def test_a_result_that_cannot_be_written_is_kept_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(output.tempfile, "tempdir", str(tmp_path))
    photo = Photo(np.full((4, 20_000, 3), 7, np.uint8))  # wider than a WebP may be
    with pytest.raises(UserError, match=r"wide.webp: cannot be written .*, it is kept as (.*)\.png") as error:
        output.keep({tmp_path / "wide.webp": photo, tmp_path / "o.png": photo})
    assert (Photo.open(str(error.value).rpartition("kept as ")[2]).array == 7).all()
    assert (Photo.open(tmp_path / "o.png").array == 7).all()
    gone = tmp_path / "gone" / "o.png"
    with pytest.raises(UserError, match=r"gone/o.png: cannot be written .*, it is kept as (.*)/o\.png"):
        output.keep({gone: photo})


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_words_that_the_screen_has_not(encoding):
    import io

    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    say("hat \u2192 \U0001f422 \udcff", stream)
    assert stream.buffer.getvalue().startswith(b"hat ") and stream.buffer.getvalue().endswith(b"\n")


@pytest.mark.slow
def test_words_to_a_closed_stream(tmp_path):
    import io

    stream = io.StringIO()
    stream.close()
    say("lost", stream)
    script = "import sys; from specedit_kernels.cli.text import say; say('lost'); sys.exit(0)"
    for target in ("/dev/full", None):
        where = open(target, "w") if target else subprocess.DEVNULL
        done = subprocess.run([sys.executable, "-c", script], stdout=where, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0 and done.stderr == ""
    done = subprocess.run(["sh", "-c", f'"{sys.executable}" -c "{script}" >&-'], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_ctrl_c_is_one_line(capsys, monkeypatch, source):
    from specedit_kernels.cli import doctor

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "report", interrupted)
    assert run(capsys, "doctor") == (130, "", "specedit: interrupted\n")


@pytest.mark.parametrize("started", [["-m", "specedit_kernels.cli"], ["specedit"]], ids=["module", "script"])
def test_ctrl_c_while_it_imports(tmp_path, started):
    """torch takes seconds to import, before the command's own lines run."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    if started[0] == "specedit":
        script = tmp_path / "specedit"
        script.write_text(f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
                          "from specedit_kernels.cli import main\nmain()\n")  # fmt: skip
        started = [str(script)]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run([sys.executable, *started, "doctor"], capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": path},
                          # a job in the background is started with it ignored
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "specedit: interrupted\n")
