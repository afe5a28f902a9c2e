# SPDX-License-Identifier: Apache-2.0
"""The parts of the tiny editor: a FLUX.1-Kontext in small, from diffusers' and transformers' own classes."""

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from text import CLIP_LENGTH, clip_tokenizer, t5_tokenizer

LATENT_CHANNELS = 16
TEXT_WIDTH = 256
POOLED_WIDTH = 128


def make_vae():
    """8x down, 16 channels. No attention: it cost a third of the time and 4 dB of the steps it took away."""
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=LATENT_CHANNELS, block_out_channels=(32, 64, 96, 96),
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1,
        norm_num_groups=8, sample_size=512, scaling_factor=1.0, shift_factor=0.0, use_quant_conv=False,
        use_post_quant_conv=False, mid_block_add_attention=False,
    )
    # At the usual start the posterior's noise (deviation 1) drowns the means, and half of a short training goes by
    # until the log-variances have come down.
    vae.encoder.conv_out.bias.data[LATENT_CHANNELS:] = -5.0
    return vae


def make_transformer():
    """One double and seven single blocks: at the same size the single ones spend more of it on the picture."""
    return FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=7, attention_head_dim=64, num_attention_heads=5,
        joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=POOLED_WIDTH, guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )


def make_clip():
    tokenizer = clip_tokenizer()
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=POOLED_WIDTH, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=CLIP_LENGTH, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, attention_dropout=0.0,
    ))


def make_t5():
    return T5EncoderModel(T5Config(
        vocab_size=len(t5_tokenizer()), d_model=TEXT_WIDTH, d_kv=32, d_ff=256, num_layers=3, num_heads=4,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", tie_word_embeddings=False, use_cache=False,
    ))


def make_scheduler():
    """FLUX.1-Kontext's."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=4096,
    )


def parameter_count(module):
    return sum(p.numel() for p in module.parameters())
