# SPDX-License-Identifier: Apache-2.0
"""Pipelines with random weights, made in code, small enough for a test to run in a second."""

import functools

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    LongCatImageEditPipeline,
    LongCatImageTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BatchFeature,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    T5Config,
    T5EncoderModel,
)

from specedit_kernels import SpecEditConfig, SpecEditFluxKontextPipeline

WORDS = ["<pad>", "<unk>", "</s>", "make", "the", "cat", "a", "dog", "remove", "blue", "red", "add", "hat"]


def tiny_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        model_max_length=max_length,
    )


def tiny_pipeline(seed: int = 0, vae_blocks: int = 4) -> FluxKontextPipeline:
    """FluxKontextPipeline of FLUX's structure: 16 latent channels, VAE 8x, a double and a single block, head dim 16."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    channels = (8, 8, 16, 16)[-vae_blocks:]
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * vae_blocks,
        up_block_types=("UpDecoderBlock2D",) * vae_blocks,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=0.36,
        shift_factor=0.12,
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=16,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=1,
            eos_token_id=len(WORDS) - 1,
            pad_token_id=0,
        )
    )
    t5 = T5EncoderModel(T5Config(vocab_size=len(WORDS), d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    pipe = FluxKontextPipeline(
        scheduler=scheduler,
        vae=vae.eval(),
        text_encoder=clip.eval(),
        tokenizer=tiny_tokenizer(32),
        text_encoder_2=t5.eval(),
        tokenizer_2=tiny_tokenizer(32),
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


QWEN_TEXT = 32  # width of the text embeddings


def tiny_qwen(plus: bool = False, zero_cond_t: bool = False, seed: int = 0, text_encoder=None, processor=None):
    """QwenImageEditPipeline or QwenImageEditPlusPipeline of Qwen's structure: 16 latent channels, VAE 8x, two blocks,
    head dim 16. Without a text encoder a call has to bring its embeddings (`qwen_text`)."""
    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=QWEN_TEXT,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=zero_cond_t,
    )
    vae = AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    pipe = (QwenImageEditPlusPipeline if plus else QwenImageEditPipeline)(
        scheduler=scheduler,
        vae=vae.eval(),
        text_encoder=text_encoder,
        tokenizer=None,
        processor=processor,
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def qwen_text(length: int = 12, batch: int = 1, padded: int = 0, seed: int = 3, negative: bool = False) -> dict:
    """Embeddings and mask of a call, random. padded: how many tokens at the end of the last text are padding."""
    embeds = torch.randn(batch, length, QWEN_TEXT, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(batch, length, dtype=torch.long)
    if padded:
        mask[-1, -padded:] = 0
    prefix = "negative_" if negative else ""
    return {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_embeds_mask": mask}


def tiny_image(height: int = 128, width: int = 128, seed: int = 0) -> PIL.Image.Image:
    """A smooth random picture with a sharp rectangle in it."""
    rng = np.random.default_rng(seed)
    small = PIL.Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    array = np.array(small.resize((width, height), PIL.Image.BICUBIC))
    array[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return PIL.Image.fromarray(array)


def call_options(**changes) -> dict:
    """Options of a small call: 128 x 128 pixels (8 x 8 fine tokens), short text."""
    options = dict(
        prompt="make the cat blue", max_area=128 * 128, _auto_resize=False, max_sequence_length=16, output_type="latent"
    )
    return {**options, **changes}


def left_half() -> PIL.Image.Image:
    """A mask of the left half of 128 x 128 pixels."""
    mask = PIL.Image.new("L", (128, 128))
    mask.paste(255, (0, 0, 64, 128))
    return mask


def edit_left_half(pipe, call: dict | None = None, **config):
    """The left half of a picture edited by a tiny FLUX or Qwen pipeline, Qwen's with guidance; latents."""
    given = dict(image=tiny_image(), mask_image=left_half(), generator=torch.Generator().manual_seed(1))
    given |= dict(output_type="latent", specedit=SpecEditConfig(**config)) | (call or {})
    if isinstance(pipe, SpecEditFluxKontextPipeline):
        return pipe(**call_options(**given))
    given = dict(qwen_text() | qwen_text(negative=True, seed=4), true_cfg_scale=2.0, max_area=128 * 128) | given
    like = pipe.transformer  # embeddings and masks have to be where it is: neither pipeline brings them there
    for name in [name for name in given if "prompt_embeds" in name]:
        x = given[name].to(like.device)
        given[name] = x.to(like.dtype) if x.is_floating_point() else x
    return pipe(**given)


class TinyVisionProcessor:
    """What QwenImageEditPipeline asks of a Qwen2VLProcessor: a token for each character, and for each picture as many
    as the image processor gives patches. The real one needs torchvision."""

    def __init__(self):
        self.pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 56 * 56})

    def __call__(self, text, images, padding, return_tensors):
        seen = self.pictures(images=images, return_tensors="pt")
        patches = iter((seen["image_grid_thw"].prod(dim=1) // 4).tolist())
        rows = []
        for line in text:
            ids = []
            for i, part in enumerate(line.split("<|image_pad|>")):
                ids += [60] * next(patches) if i else []
                ids += [ord(c) % 60 for c in part]
            rows.append(ids)
        longest = max(map(len, rows))
        return BatchFeature(
            {
                "input_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids in rows]),
                "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in rows]),
                **seen,
            }
        )


def tiny_vision_encoder() -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL of one layer on either side."""
    torch.manual_seed(1)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=64,
            hidden_size=QWEN_TEXT,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        ),
        vision_config=dict(
            depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=QWEN_TEXT, window_size=56,
            fullatt_block_indexes=[0],
        ),
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def paper(**options) -> SpecEditConfig:
    """A config that computes every step whole, finishes with all tokens and runs the transformer's own forward, where
    the options say nothing else."""
    return SpecEditConfig(**{"quality": "paper", "runner": "eager"} | options)


def small_qwen(patch: pytest.MonkeyPatch) -> None:
    """Both stock pipelines work on a megapixel whatever they are given; now on 128 x 128 pixels."""
    area = 128 * 128
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        real = module.calculate_dimensions

        def smaller(of, ratio, real=real):
            return real(area if of == 1024 * 1024 else of, ratio)

        patch.setattr(module, "calculate_dimensions", smaller)
    patch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 64 * 64)


WIDTH = 24  # of LongCat's and FLUX.2's text embeddings


def small_longcat(patch: pytest.MonkeyPatch) -> None:
    """The stock pipeline works on a megapixel; now on 128 x 128 pixels. Its vision encoder is left out: what stands
    for it depends on the prompt and on the picture that it is given, and pads nothing."""
    real = pipeline_longcat_image_edit.calculate_dimensions
    smaller = lambda area, ratio: real(min(area, 128 * 128), ratio)  # noqa: E731
    patch.setattr(pipeline_longcat_image_edit, "calculate_dimensions", smaller)

    def encode(self, prompt, image):
        generator = torch.Generator().manual_seed(sum(map(ord, prompt[0])))
        return torch.randn(1, 9 + len(prompt[0]), WIDTH, generator=generator) + np.asarray(image).mean() / 255

    patch.setattr(LongCatImageEditPipeline, "_encode_prompt", encode)


class NoProcessor:
    image_processor = None


def tiny_longcat(seed=0):
    """A double and a single block of head dim 16, FLUX.1's autoencoder."""
    torch.manual_seed(seed)
    transformer = LongCatImageTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=[4, 6, 6],
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=16, norm_num_groups=4,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False, scaling_factor=0.36,
        shift_factor=0.12,
    )  # fmt: skip
    pipe = LongCatImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=vae.eval(), text_encoder=None, tokenizer=None,
        text_processor=NoProcessor(), transformer=transformer.eval(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flux2(kind, seed=0):
    """One double and two single blocks of head dim 16, a 32-channel VAE of 8x with a batch norm that has seen data."""
    torch.manual_seed(seed)
    transformer = Flux2Transformer2DModel(
        in_channels=128, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=kind == "dev",
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    parts = dict(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), vae=vae.eval(),
        text_encoder=None, tokenizer=None, transformer=transformer.eval(),
    )  # fmt: skip
    pipe = Flux2Pipeline(**parts) if kind == "dev" else Flux2KleinPipeline(**parts, is_distilled=kind == "klein")
    pipe.set_progress_bar_config(disable=True)
    return pipe


# {stock pipeline class: makes (a pipeline with random weights, call)}, for each that is registered: what
# test_registered_models.py holds every model to. call(guided): the arguments of a call on a picture of 128 x 128
# pixels, for one prompt; guided: with true guidance, where the model has it. patch: for what the stock call has fixed.


def _tiny_flux(patch):
    def call(guided=False):
        extra = dict(negative_prompt="red", true_cfg_scale=3.0) if guided else {}
        return call_options(image=tiny_image(), height=128, width=128, **extra)

    return tiny_pipeline(), call


def _tiny_qwen(patch, plus):
    small_qwen(patch)

    def call(guided=False):
        text = qwen_text()
        if guided:
            text.update(qwen_text(7, negative=True, seed=4), true_cfg_scale=3.0)
        pictures = [tiny_image(), tiny_image(96, 160, seed=1)] if plus else tiny_image()
        return dict(text, image=pictures, height=128, width=128)

    return tiny_qwen(plus, zero_cond_t=plus), call


def _tiny_longcat(patch):
    small_longcat(patch)

    def call(guided=False):
        return dict(image=tiny_image(), prompt="make it blue", guidance_scale=3.0 if guided else 1.0)

    return tiny_longcat(), call


def _tiny_flux2(patch, kind):
    def call(guided=False):
        random = torch.Generator().manual_seed(3)
        found = dict(image=[tiny_image(), tiny_image(96, 160, seed=1)], height=128, width=128)
        found["prompt_embeds"] = torch.randn(1, 12, WIDTH, generator=random)
        if kind == "klein-base":
            negative = torch.randn(1, 9, WIDTH, generator=random)
            found.update(negative_prompt_embeds=negative, guidance_scale=3.0 if guided else 1.0)
        return found

    return tiny_flux2(kind), call


TINY = {
    "Flux2KleinPipeline": functools.partial(_tiny_flux2, kind="klein-base"),
    "Flux2Pipeline": functools.partial(_tiny_flux2, kind="dev"),
    "LongCatImageEditPipeline": _tiny_longcat,
    "FluxKontextPipeline": _tiny_flux,
    "QwenImageEditPipeline": functools.partial(_tiny_qwen, plus=False),
    "QwenImageEditPlusPipeline": functools.partial(_tiny_qwen, plus=True),
}
