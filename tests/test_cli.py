# SPDX-License-Identifier: Apache-2.0
"""The command, end to end on a tiny model with random weights: what it writes, what it says, how it fails."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from tiny_models import qwen_text, tiny_image, tiny_pipeline, tiny_qwen  # noqa: E402

from specedit_kernels import cli  # noqa: E402

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
        asked.append((prompt, len(image)))
        return qwen_text(len(prompt)).values()

    monkeypatch.setattr(Plus, "encode_prompt", encode_prompt)
    monkeypatch.setattr(Plus, "from_pretrained", lambda folder, **options: load(folder, **absent, **options))
    return asked


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.png"
    tiny_image(128, 160).save(path)
    return path


def run(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
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


def test_edit_writes_picture_and_overlay_and_a_summary(capsys, tmp_path, model, source):
    out = tmp_path / "out" / "edited.png"
    out.parent.mkdir()
    code, text, _ = run(
        capsys, "edit", source, "make the cat blue", "-o", out, "--model", model, "--device", "cpu",
        "--mask", half(tmp_path), "--seed", 3,
    )  # fmt: skip
    assert code == 0
    edited, overlay = PIL.Image.open(out), PIL.Image.open(out.with_name("mask.png"))
    # 160 x 128 at the area of 128 x 128, in whole blocks of 32 pixels
    assert edited.size == overlay.size == (128, 96)
    expected = np.array(PIL.Image.open(source).resize((128, 96), PIL.Image.LANCZOS))
    assert (np.array(edited)[:, 64 + 8 :] == expected[:, 64 + 8 :]).all()
    assert not (np.array(edited)[:, :64] == expected[:, :64]).all()
    assert sorted(p.name for p in out.parent.iterdir()) == ["edited.png", "mask.png"]
    for word in ("24 of 48 tokens", "50.0 %", "2 x coarse 24", "4 x mixed 60", "3 x full 96", "reference", "28 steps"):
        assert word in text
    assert len(text.splitlines()) <= 12


def test_edit_is_repeatable_and_seeds_differ(capsys, tmp_path, model, source):
    pictures = []
    for i, seed in enumerate((1, 1, 2)):
        out = tmp_path / f"{i}.png"
        options = ("--model", model, "--device", "cpu", "--mask", half(tmp_path), "--seed", seed, "--steps", 4)
        assert run(capsys, "edit", source, "add a hat", "-o", out, *options)[0] == 0
        pictures.append(np.array(PIL.Image.open(out)))
    assert (pictures[0] == pictures[1]).all() and not (pictures[0] == pictures[2]).all()


def test_edit_finds_the_class_of_the_folder(capsys, tmp_path, qwen, source, texts):
    out, other = tmp_path / "edited.png", tmp_path / "other.png"
    tiny_image(160, 96, seed=1).save(other)
    options = ("-o", out, "--model", qwen, "--device", "cpu", "--mask", half(tmp_path))
    code, text, error = run(capsys, "edit", source, "add a hat", *options)
    assert error == ""
    # 160 x 128 at the area of 128 x 128, rounded to multiples of 32 pixels: 8 x 8 tokens (and as many of the source)
    assert code == 0 and PIL.Image.open(out).size == (128, 128) and texts == [("add a hat", 1), (" ", 1)]
    assert "(plain: 128)" in text and "50 steps" in text and "32 of 64 tokens" in text
    lone = np.array(PIL.Image.open(out))
    code, text, _ = run(capsys, "edit", source, "add a hat", *options, "--reference", other)
    assert code == 0 and PIL.Image.open(out).size == (128, 128) and texts[2:] == [("add a hat", 2), (" ", 2)]
    # 10 x 6 tokens of the further picture
    assert "(plain: 188)" in text and not (np.array(PIL.Image.open(out)) == lone).all()
    assert run(capsys, "edit", source, "add a hat", *options, "--true-cfg-scale", "1", "--preset", "4")[0] == 0
    assert texts[4:] == [("add a hat", 1)]


def test_settings_of_a_folder(tmp_path):
    flux, plus = cli.SUPPORTED[0], cli.SEVERAL_PICTURES
    assert cli.model_settings(tmp_path, flux) == {"true_cfg_scale": 1.0}
    assert cli.model_settings(tmp_path, flux, 2.0) == {"true_cfg_scale": 2.0, "negative_prompt": ""}
    assert cli.model_settings(tmp_path, plus) == {"true_cfg_scale": 4.0, "negative_prompt": " "}
    (tmp_path / "specedit.json").write_text('{"true_cfg_scale": 1, "resolution": 64, "max_sequence_length": 8}')
    distilled = {"true_cfg_scale": 1.0, "max_area": 4096, "max_sequence_length": 8}
    assert cli.model_settings(tmp_path, plus) == distilled
    assert cli.model_settings(tmp_path, flux) == {**distilled, "_auto_resize": False}
    assert cli.model_settings(tmp_path, plus, 3.0)["true_cfg_scale"] == 3.0


def test_edit_says_when_nothing_changes(capsys, tmp_path, model, source):
    out = tmp_path / "same.png"
    options = ("--model", model, "--device", "cpu", "--threshold", 4, "--draft", "quarter")
    code, text, _ = run(capsys, "edit", source, "add a hat", "-o", out, *options)
    assert code == 0 and "nothing changes: the source is returned" in text
    expected = np.array(PIL.Image.open(source).resize((128, 96), PIL.Image.LANCZOS))
    assert (np.array(PIL.Image.open(out)) == expected).all()


def test_mask_finds_what_changed(capsys, tmp_path, model, source):
    picture = PIL.Image.open(source)
    edited = tmp_path / "edited.jpg"
    changed = picture.copy()
    changed.paste((255, 0, 0), (96, 32, 128, 64))
    changed.resize((320, 256)).save(edited, quality=95)
    out = tmp_path / "heat.png"
    options = ("--vae", model, "--device", "cpu", "--metric", "latent", "--threshold", 0.02)
    code, text, _ = run(capsys, "mask", source, edited, "-o", out, *options)
    assert code == 0 and "10 x 8" not in text and "8 x 10 tokens of 16 pixels" in text and "was 320 x 256" in text
    assert PIL.Image.open(out).size == (160, 128)
    code, text, _ = run(capsys, "mask", source, source, "-o", out, *options)
    assert code == 0 and "changed     0 of 80 tokens" in text


def test_mask_takes_a_vae_folder(capsys, tmp_path, model, qwen, source):
    out = tmp_path / "heat.png"
    for folder in (model / "vae", qwen / "vae", qwen):
        code, text, _ = run(capsys, "mask", source, source, "-o", out, "--vae", folder, "--device", "cpu")
        assert code == 0 and "8 x 10 tokens of 16 pixels" in text and "changed     0 of 80 tokens" in text


def test_heat_map_marks_the_scores():
    import torch

    picture = PIL.Image.new("RGB", (64, 64), (128, 128, 128))
    scores = torch.zeros(4, 4)
    scores[1, 2] = 2.0
    array = np.array(cli.heat_map(picture, scores, 0.1)).astype(int)
    assert (array[16:32, 32:48, 0] > 190).all()
    assert (array[:16] == array[0, 0]).all() and abs(array[0, 0] - 128).max() <= 1


def test_pictures_are_read_upright_and_on_white(tmp_path):
    path = tmp_path / "a.png"
    PIL.Image.new("RGBA", (8, 4), (0, 0, 0, 0)).save(path)
    assert np.array(cli.read_image(path)).min() == 255
    turned = PIL.Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "b.jpg", exif=exif)
    assert cli.read_image(tmp_path / "b.jpg").size == (4, 8)


def test_sixteen_bit_greys_and_transparent_masks(capsys, tmp_path):
    grey = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    PIL.Image.fromarray(grey).save(tmp_path / "a.png")
    expected = np.repeat((grey / 257).round().astype(np.uint8)[..., None], 3, axis=2)
    assert (np.array(cli.read_image(tmp_path / "a.png")) == expected).all()
    PIL.Image.new("F", (8, 8), 0.5).save(tmp_path / "b.tif")
    with pytest.raises(cli.UserError, match="expected 8 or 16 bits"):
        cli.read_image(tmp_path / "b.tif")
    # in a mask, what is not painted is not to be edited
    PIL.Image.new("RGBA", (8, 4), (255, 255, 255, 0)).save(tmp_path / "c.png")
    assert np.array(cli.read_image(tmp_path / "c.png", behind="black")).max() == 0


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
    assert "not a file" in edit(tmp_path)
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


def test_wrong_options(capsys, source):
    assert "--preset: invalid choice" in fails(capsys, "edit", source, "add a hat", "--preset", "10")
    assert "--draft: invalid choice" in fails(capsys, "edit", source, "add a hat", "--draft", "half")
    assert "instruction: expected a text" in fails(capsys, "edit", source, "  ")
    assert "required" in fails(capsys, "edit", source)
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
    assert "QwenImageEditPipeline or QwenImageEditPlusPipeline" in edit(empty)
    assert "FluxKontextPipeline, which takes one picture" in edit(model, "--reference", source)
    (empty / "config.json").write_text('{"_class_name": "AutoencoderDC"}')
    odd = fails(capsys, "mask", source, source, "-o", tmp_path / "h.png", "--vae", empty)
    assert "a AutoencoderDC; expected AutoencoderKL or AutoencoderKLQwenImage" in odd
    (empty / "config.json").unlink()
    shutil.copy(model / "model_index.json", empty)
    assert "the model cannot be loaded" in edit(empty)
    (empty / "specedit.json").write_text('{"resolution": "wide"}')
    assert "expected an object with whole numbers" in edit(empty)
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


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "out.png"
    path.write_bytes(b"old")

    class Breaks:
        def save(self, file, format):
            file.write(b"half a pic")
            raise OSError(28, "No space left on device")

    with pytest.raises(cli.UserError, match="cannot be written"):
        cli.write_image(Breaks(), path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["out.png"]


def test_help_does_not_load_the_pipelines():
    code = (
        "import sys; from specedit_kernels import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'diffusers', 'transformers', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("edit", "mask", "doctor"))


def test_shipped_models_have_names(tmp_path, monkeypatch):
    """A name is a shipped folder's, unless a folder of that name stands here; a path is itself."""
    monkeypatch.chdir(tmp_path)
    assert cli.model_folder("tiny_kontext") == cli.SHIPPED_MODEL
    assert cli.model_folder(tmp_path / "tiny_kontext") == tmp_path / "tiny_kontext"
    assert cli.model_folder("elsewhere") == Path("elsewhere")
    (tmp_path / "tiny_kontext").mkdir()
    assert cli.model_folder("tiny_kontext") == Path("tiny_kontext")
