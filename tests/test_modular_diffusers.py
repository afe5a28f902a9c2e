# SPDX-License-Identifier: Apache-2.0
"""Blocks for diffusers' modular pipelines, on the shipped tiny editors: the drop-in pipeline's results, to the bit."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the blocks need diffusers")

from diffusers import FlowMatchEulerDiscreteScheduler, ModularPipelineBlocks
from diffusers.modular_pipelines import FluxKontextAutoBlocks, QwenImageEditAutoBlocks
from PIL import Image

import specedit_kernels
from specedit_kernels import SpecEditConfig, SpecEditFluxKontextPipeline, SpecEditQwenImageEditPipeline
from specedit_kernels.hosts import modular_diffusers

ASSETS = Path(specedit_kernels.__file__).parent / "assets"
FOLDERS = Path(__file__).resolve().parents[1] / "integrations" / "modular_diffusers"
SIDE = 128
CONFIG = SpecEditConfig(preset=4, finish="locked", preserve="pixels", metric="latent", threshold=0.6)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not ASSETS.is_dir(), reason="the tiny editors are in a clone alone"),
]


class Editor:
    """A tiny editor both ways: as the drop-in pipeline, and as a modular one made from a folder of integrations/."""

    def __init__(self, name, kind, checkpoint, **options):
        self.checkpoint, self.options = ASSETS / checkpoint, options
        blocks = ModularPipelineBlocks.from_pretrained(str(FOLDERS / name), trust_remote_code=True)
        self.modular = blocks.init_pipeline(str(self.checkpoint))
        self.modular.load_components()
        self.drop_in = kind.from_pretrained(self.checkpoint)
        for pipe in (self.modular, self.drop_in):
            pipe.set_progress_bar_config(disable=True)

    def call(self, **changes):
        options = dict(image=picture(), prompt="color the turtle purple", max_area=SIDE**2, specedit=CONFIG)
        return {**options, **self.options, "generator": torch.Generator().manual_seed(0), **changes}

    def plain(self, **changes):
        """The drop-in call; with the embeddings of Qwen's stock block, which sees the picture at another size."""
        options = self.call(**changes)
        if isinstance(self.drop_in, SpecEditQwenImageEditPipeline):
            shown = picture().resize((1024, 1024), Image.Resampling.LANCZOS)
            embeds, mask = self.drop_in.encode_prompt(options.pop("prompt"), shown)
            options |= dict(prompt_embeds=embeds, prompt_embeds_mask=mask, true_cfg_scale=1.0)
        return self.drop_in(**options)


@pytest.fixture(scope="module", params=["flux_kontext", "qwen_image_edit"])
def editor(request, tmp_path_factory):
    from diffusers.utils import dynamic_modules_utils

    before = dynamic_modules_utils.HF_MODULES_CACHE
    dynamic_modules_utils.HF_MODULES_CACHE = str(tmp_path_factory.mktemp("modules"))
    try:
        if request.param == "flux_kontext":
            small = dict(_auto_resize=False, max_sequence_length=16)
            made = Editor(request.param, SpecEditFluxKontextPipeline, "tiny_kontext", **small)
        else:
            made = Editor(request.param, SpecEditQwenImageEditPipeline, "tiny_qwen_image_edit")
            made.modular.guider.disable()
    finally:
        dynamic_modules_utils.HF_MODULES_CACHE = before
    return made


def picture(turn=0):
    found = Image.open(ASSETS / "example.png").convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return found.rotate(turn)


def box():
    mask = Image.new("L", (SIDE, SIDE), 0)
    mask.paste(255, (0, 64, 48, 112))
    return mask


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, "box"])
def test_equals_the_drop_in_pipeline(editor, mask):
    changes = {} if mask is None else {"mask_image": box()}
    expected = editor.plain(**changes, output_type="np")
    state = editor.modular(**editor.call(**changes, output_type="np"))
    assert np.array_equal(state.get("images"), expected.images)
    assert torch.equal(state.get("edit_mask"), expected.mask)
    assert state.get("specedit_stats").nfe == 4 and (state.get("height"), state.get("width")) == (SIDE, SIDE)
    if mask is None:
        assert torch.equal(state.get("edit_scores"), expected.scores)
    else:
        assert 0 < expected.mask.float().mean() < 0.5 and state.get("edit_scores") is None
        source = np.asarray(picture(), np.float32) / 255
        assert np.array_equal(state.get("images")[0][:40], source[:40])  # preserve="pixels"
        assert np.abs(state.get("images")[0] - source).max() > 0.05


@pytest.mark.slow
def test_in_the_stock_map(editor):
    """The denoise block alone between stock ones: the stock decoder takes its latents."""
    flux = isinstance(editor.drop_in, SpecEditFluxKontextPipeline)
    blocks = FluxKontextAutoBlocks() if flux else QwenImageEditAutoBlocks()
    kind = "FluxKontext" if flux else "QwenImageEdit"
    blocks.sub_blocks["denoise"] = getattr(modular_diffusers, f"SpecEdit{kind}DenoiseStep")()
    if not flux:
        blocks.sub_blocks.pop("vae_encoder")  # encodes a megapixel
    pipe = blocks.init_pipeline(str(editor.checkpoint))
    pipe.update_components(**{n: c for n, c in editor.modular.components.items() if n in pipe.components})
    pipe.set_progress_bar_config(disable=True)
    config = SpecEditConfig(preset=4, finish="locked", metric="latent", threshold=0.6)
    options = dict(specedit=config, output_type="np")
    expected = editor.plain(mask_image=box(), **options).images
    # its own name for the mask triggers inpainting's blocks in the stock Qwen map
    state = pipe(**editor.call(mask_image=box(), **options))
    assert np.abs(state.get("images") - expected).max() < 1e-5


@pytest.mark.slow
def test_mask_from_two_pictures(editor):
    edited = np.array(picture())
    edited[64:96, 32:64] = 255 - edited[64:96, 32:64]
    config = SpecEditConfig(preset=4, finish="locked", preserve="pixels", metric="latent", dilation=0)
    two = dict(edited_image=Image.fromarray(edited), mask_threshold=0.3, specedit=config)
    state = editor.modular(**editor.call(**two))
    mask, found = state.get("mask_image")[0], state.get("edit_mask")[0]
    assert mask.shape == (8, 8) and mask[4:6, 2:4].all() and mask.float().mean() < 0.5
    assert not (mask & ~found).any() and state.get("edit_scores") is None
    given = editor.modular(**editor.call(**two, mask_image=box()))
    assert given.get("edit_mask")[0, 4:7, :3].all() and not given.get("edit_mask")[0, :4].any()
    with pytest.raises(TypeError, match="edited_image: expected a PIL picture"):
        editor.modular(**editor.call(edited_image=edited))


@pytest.mark.slow
def test_nothing_is_stale(editor):
    call = editor.call
    first = editor.modular(**call(mask_image=box()))
    held = modular_diffusers._PIPELINES[editor.modular]
    other = editor.modular(**call(image=picture(90), mask_image=box()))
    assert modular_diffusers._PIPELINES[editor.modular] is held
    again = editor.modular(**call(mask_image=box()))
    assert first.get("images") == again.get("images") != other.get("images")
    # neither blocks nor states, which diffusers copies, copy weights
    assert not any(isinstance(x, torch.nn.Module) for x in vars(editor.modular.blocks.sub_blocks["denoise"]).values())
    assert copy.deepcopy(first).get("specedit_decode") is first.get("specedit_decode")
    before = editor.modular.scheduler
    editor.modular.update_components(scheduler=FlowMatchEulerDiscreteScheduler.from_config(before.config, shift=9.0))
    try:
        editor.modular(**call(mask_image=box()))
        assert modular_diffusers._PIPELINES[editor.modular].scheduler.config.shift == 9.0
    finally:
        editor.modular.update_components(scheduler=before)


@pytest.mark.slow
def test_wrong_inputs(editor):
    with pytest.raises(ValueError, match="specedit: expected a SpecEditConfig or None, got False"):
        editor.modular(**editor.call(specedit=False))
    with pytest.raises(ValueError, match="output_type: expected 'pil', 'np' or 'pt', got 'latent'"):
        editor.modular(**editor.call(mask_image=box(), output_type="latent"))


@pytest.mark.slow
def test_guidance(editor):
    """The guider's scale is that of true guidance, against the text encoder's blank text."""
    if not isinstance(editor.drop_in, SpecEditQwenImageEditPipeline):
        pytest.skip("FLUX.1-Kontext's blocks have no guider")
    editor.modular.guider.enable()
    try:
        state = editor.modular(**editor.call(mask_image=box(), output_type="np"))
        texts = {name: state.get(name) for name in ("prompt_embeds", "negative_prompt_embeds")}
        options = {k: v for k, v in editor.call(mask_image=box(), output_type="np").items() if k != "prompt"}
        expected = editor.drop_in(**options, **texts, true_cfg_scale=editor.modular.guider.guidance_scale)
        assert np.array_equal(state.get("images"), expected.images)
        assert not np.array_equal(state.get("images"), editor.plain(mask_image=box(), output_type="np").images)
    finally:
        editor.modular.guider.disable()
