# SPDX-License-Identifier: Apache-2.0
"""The shipped checkpoints, loaded by diffusers' own code, and the example edit of the README."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the pipelines need diffusers")

from diffusers import FluxKontextPipeline, QwenImageEditPipeline
from PIL import Image

import specedit_kernels
from specedit_kernels import (
    SpecEditConfig,
    SpecEditFluxKontextPipeline,
    SpecEditQwenImageEditPipeline,
)
from specedit_kernels.cli import main, models
from specedit_kernels.flash_edit.pipeline import COSI

ASSETS = Path(specedit_kernels.__file__).parent / "assets"
MODEL = ASSETS / "tiny_kontext"
QWEN = ASSETS / "tiny_qwen_image_edit"


@pytest.fixture(scope="module")
def pipe():
    """Loaded as any user would: no code of ours."""
    loaded = FluxKontextPipeline.from_pretrained(MODEL)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize("model", [MODEL, QWEN], ids=lambda folder: folder.name)
def test_size(model):
    sizes = {path: path.stat().st_size for path in model.rglob("*") if path.is_file()}
    one_step = sum(size for path, size in sizes.items() if path.parent.name == COSI)
    assert one_step <= 15_000_000 and bool(one_step) == (model == MODEL)  # FlashEdit's
    assert 30_000_000 < sum(sizes.values()) - one_step <= 40_000_000
    assert max(sizes.values()) <= 15_000_000


@pytest.mark.slow
def test_it_is_a_kontext(pipe):
    assert pipe.vae.config.latent_channels == 16 and pipe.vae_scale_factor == 8
    assert pipe.transformer.config.in_channels == 64 and pipe.transformer.config.guidance_embeds
    assert pipe.text_encoder.config.eos_token_id == pipe.tokenizer.eos_token_id != 2
    ids = pipe.tokenizer_2("make the turtle purple").input_ids
    assert pipe.tokenizer_2.unk_token_id not in ids and len(ids) == 5


@pytest.mark.slow
@pytest.mark.parametrize("length", [32, 512])
def test_plain_pipeline_keeps_the_source(pipe, length):
    """Two plain steps at 256 pixels: what was not asked for is still there, with short and with default padding."""
    source = Image.open(ASSETS / "example.png").resize((256, 256), Image.Resampling.LANCZOS)
    out = pipe(
        image=source,
        prompt="color the turtle purple",
        height=256,
        width=256,
        max_area=256**2,
        _auto_resize=False,
        num_inference_steps=2,
        max_sequence_length=length,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    rows = slice(0, 120)  # above the turtle
    error = np.abs(out[rows] - np.asarray(source, dtype=np.float32)[rows] / 255).mean()
    assert error < 0.05


# rows above `top` and columns from `right` on are far from the turtle. A block is wider where there are fewer pixels,
# and the one-step draft's noise decides whether a further one beside the turtle is taken: other noise is drawn in bf16
@pytest.mark.slow
@pytest.mark.parametrize("side, top, right, options", [(512, 240, 264, []), (256, 80, 176, ["--method", "flash"])],
                         ids=["specedit", "flash"])  # fmt: skip
def test_the_example_edit(tmp_path, capsys, monkeypatch, side, top, right, options):
    """The README's first command, also in one step with the shipped generator and inversion network (fewer pixels, for
    the time it takes): the turtle turns purple, every pixel away from it keeps its bits."""
    settings, scale = models.model_settings, side / 512
    monkeypatch.setattr(models, "model_settings", lambda *given: settings(*given) | {"max_area": side**2})
    instruction = (ASSETS / "example.txt").read_text().strip()
    code = main(["edit", str(ASSETS / "example.png"), instruction, "-o", str(tmp_path / "edited.png"),
                 "--output-size", "working", *options])  # fmt: skip
    assert not code
    assert not options or "noise       of the source, white in the edit region" in capsys.readouterr().out
    source = Image.open(ASSETS / "example.png").convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    source = np.asarray(source).astype(int)
    edited = np.asarray(Image.open(tmp_path / "edited.png")).astype(int)
    with Image.open(ASSETS / "example.png") as given:
        assert Image.open(tmp_path / "mask.png").size == given.size
    changed = (source != edited).any(2)
    assert 0.02 < changed.mean() < 0.4
    assert not changed[:top].any() and not changed[:, right:].any()  # of the gift, of the flower
    turtle = (source[..., 1] > source[..., 0] + 40) & (source[..., 1] > source[..., 2] + 40)  # green pixels
    turtle[: int(300 * scale)] = False
    turtle[:, int(200 * scale) :] = False
    red, green, blue = edited[turtle].mean(0)
    assert turtle.sum() > 3000 * scale**2 and blue > green + 60 and red > green + 30


@pytest.mark.slow
def test_from_pretrained_gives_the_drop_in_class(pipe):
    ours = SpecEditFluxKontextPipeline.from_pipe(pipe)
    ours.set_progress_bar_config(disable=True)
    source = Image.open(ASSETS / "example.png").resize((256, 256), Image.Resampling.LANCZOS)
    out = ours(
        image=source,
        prompt="color the turtle purple",
        height=256,
        width=256,
        max_area=256**2,
        _auto_resize=False,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(0),
        specedit=SpecEditConfig(preset=9, finish="locked", preserve="pixels"),
    )
    share = out.mask.float().mean().item()
    assert 0.02 < share < 0.6 and out.stats.nfe == 9 and out.stats.fallbacks == [None]
    plain = 9 * out.stats.plain_step_flops
    assert sum(step.flops for step in out.stats.steps) < 0.8 * plain


@pytest.mark.slow
def test_the_tiny_qwen_edits():
    """Loaded by diffusers' own code; at 256 pixels the turtle turns purple and the rest stays as it is."""
    plain = QwenImageEditPipeline.from_pretrained(QWEN)
    assert plain.transformer.config.in_channels == 64 and plain.vae.config.z_dim == 16
    ours = SpecEditQwenImageEditPipeline(**plain.components)
    ours.set_progress_bar_config(disable=True)
    picture = Image.open(ASSETS / "example.png").convert("RGB").resize((256, 256), Image.Resampling.LANCZOS)
    settings = models.model_settings(models.model_folder("tiny_qwen_image_edit"), "QwenImageEditPipeline")
    assert settings == {"max_area": 512**2, "true_cfg_scale": 1.0}
    out = ours(
        image=picture,
        prompt="color the turtle purple",
        generator=torch.Generator().manual_seed(0),
        specedit=SpecEditConfig(preset=9, finish="locked", preserve="pixels"),
        **settings | {"max_area": 256**2},
    )
    assert out.stats.nfe == 9 and out.stats.fallbacks == [None] and out.mask.float().mean() < 0.4
    source, edited = (np.asarray(x).astype(int) for x in (picture, out.images[0]))
    assert not (source != edited)[:120].any()  # above the turtle
    turtle = (source[..., 1] > source[..., 0] + 40) & (source[..., 1] > source[..., 2] + 40)  # green pixels
    turtle[:150] = False
    turtle[:, 100:] = False
    red, green, blue = edited[turtle].mean(0)
    assert turtle.sum() > 1500 and blue > green + 60 and red > green + 30
