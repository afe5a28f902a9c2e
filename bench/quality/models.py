# SPDX-License-Identifier: Apache-2.0
"""The parts of the tiny editors: a FLUX.1-Kontext, a Qwen-Image-Edit and a FLUX.2-klein in small, from diffusers' and
transformers' own classes."""

from functools import partial

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from diffusers.models.transformers import transformer_qwenimage
from text import CLIP_LENGTH, clip_tokenizer, klein_tokenizer, qwen_tokenizer, t5_tokenizer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from specedit_kernels.models.qwen_image_edit import lone_frame

LATENT_CHANNELS = 16
TEXT_WIDTH = 256
POOLED_WIDTH = 128
KLEIN_WIDTH = 64  # of the text encoder; the pipeline puts three of its layers' states side by side
KLEIN_LAYERS = 27  # Flux2KleinPipeline takes the states behind layers 9, 18 and 27


def _make_kl(kind, **options):
    """8x down, 16 channels. No attention: it cost a third of the time and 4 dB of the steps it took away."""
    vae = kind(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 96, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=512,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        **options,
    )
    # At the usual start the posterior's noise (deviation 1) drowns the means, and half of a short training goes by
    # until the log-variances have come down.
    vae.encoder.conv_out.bias.data[LATENT_CHANNELS:] = -5.0
    return vae


def make_vae():
    return _make_kl(AutoencoderKL, scaling_factor=1.0, shift_factor=0.0)


def make_klein_vae():
    """The same encoder and decoder, so that FLUX's weights fit; a batch norm has the scale of each packed channel."""
    return _make_kl(AutoencoderKLFlux2)


def make_transformer():
    """One double and seven single blocks: at the same size the single ones spend more of it on the picture."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=7,
        attention_head_dim=64,
        num_attention_heads=5,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )


def make_clip():
    tokenizer = clip_tokenizer()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=POOLED_WIDTH,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attention_dropout=0.0,
        )
    )


def make_t5():
    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=256,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def make_scheduler():
    """FLUX.1-Kontext's."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def make_qwen_vae():
    """8x down, 16 channels, for pictures: without the layers that join frames, which a single frame does not use.

    Two thirds of every kernel look at earlier frames. They are zeros in a picture, and zeros here; the last third
    begins as large as a kernel of its own would.
    """
    vae = AutoencoderKLQwenImage(
        base_dim=32,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False] * 3,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    for conv in vae.modules():
        if isinstance(conv, QwenImageCausalConv3d):
            conv.weight.data[:, :, -1] *= conv.kernel_size[0] ** 0.5
            conv.weight.data[:, :, :-1] = 0.0
    vae.quant_conv.bias.data[LATENT_CHANNELS:] = -5.0  # as in make_vae
    return vae


def as_pictures(vae):
    """Lets an AutoencoderKLQwenImage compute lone frames in two dimensions, a third of the work; others as they are."""
    for conv in vae.modules():
        if isinstance(conv, QwenImageCausalConv3d):
            conv.forward = partial(lone_frame, conv)
    return vae


def make_qwen_transformer():
    """Six blocks; half of their weights are the text stream's."""
    return QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 28, 28),
    )


_complex_rotary = transformer_qwenimage.apply_rotary_emb_qwen


def _real_rotary(x, freqs, use_real=True, use_real_unbind_dim=-1):
    if use_real or freqs.is_complex():
        return _complex_rotary(x, freqs, use_real, use_real_unbind_dim)
    cos, sin = freqs[:, None].unbind(-1)  # [S, 1, D/2]
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(x)


def in_real_numbers(transformer):
    """Lets a QwenImageTransformer2DModel rotate in real numbers: Inductor fuses these, and leaves complex ones as they
    are. Others stay as they are."""
    if not isinstance(transformer, QwenImageTransformer2DModel):
        return
    positions = transformer.pos_embed.forward
    # a clone: a compiled block's argument is then no view of complex numbers
    transformer.pos_embed.forward = lambda *args, **kwargs: tuple(
        torch.view_as_real(freqs).clone() for freqs in positions(*args, **kwargs)
    )
    transformer_qwenimage.apply_rotary_emb_qwen = _real_rotary


def make_qwen_text():
    """A Qwen2.5-VL of two layers; its vision tower is as small as can be, because no picture is shown to it."""
    tokenizer = qwen_tokenizer()
    special = {
        name: tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image_token_id", "image_pad"),
            ("video_token_id", "video_pad"),
            ("vision_start_token_id", "vision_start"),
            ("vision_end_token_id", "vision_end"),
        )
    }
    ends = dict(
        bos_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=dict(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=512,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=True,
                use_cache=False,
                **ends,
                rope_parameters={"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0},
            ),
            vision_config=dict(
                depth=1,
                hidden_size=16,
                intermediate_size=16,
                num_heads=2,
                out_hidden_size=TEXT_WIDTH,
                window_size=56,
                fullatt_block_indexes=[0],
            ),
            tie_word_embeddings=True,
            **special,
            **ends,
        )
    )


def make_qwen_scheduler():
    """Qwen-Image-Edit's."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def make_klein_transformer():
    """One double and seven single blocks, as FLUX's, of 256 channels: with the rest the folder stays under 25 MB."""
    return Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=7,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=3 * KLEIN_WIDTH,
        axes_dims_rope=(8, 24, 24, 8),
        guidance_embeds=False,
    )


def make_klein_text():
    """A Qwen3 of 27 narrow layers, so that the pipeline's default layers are there.

    Embeddings begin at unit deviation: the transformer takes states without a norm, and by the usual .02 they would say
    nothing for a long time.
    """
    tokenizer = klein_tokenizer()
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=KLEIN_WIDTH,
            intermediate_size=96,
            num_hidden_layers=KLEIN_LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            tie_word_embeddings=True,
            use_cache=False,
            bos_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    torch.nn.init.normal_(encoder.get_input_embeddings().weight)
    return encoder


def make_klein_scheduler():
    """FLUX.2-klein's; the pipeline gives the shift, by tokens and steps."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True)


def parameter_count(module):
    return sum(p.numel() for p in module.parameters())
