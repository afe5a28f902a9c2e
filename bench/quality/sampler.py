# SPDX-License-Identifier: Apache-2.0
"""Plain Euler sampling of a batch of edits, step for step as FluxKontextPipeline does one: the same sigmas, ids,
packing and guidance, without its resizing."""

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift

from specedit_kernels.sampling.grid import pack, unpack


def image_ids(rows, columns, index, device):
    """[rows * columns, 3]: (index, row, column); index 0 is the target, 1 the condition."""
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 0] = index
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)[None]
    return ids.view(-1, 3)


def joint_ids(h, w, device):
    """Ids of target and condition tokens for a latent of h x w."""
    return torch.cat([image_ids(h // 2, w // 2, index, device) for index in (0, 1)])


def shift_mu(scheduler, tokens):
    """The timestep shift for a target of `tokens` tokens."""
    config = scheduler.config
    return calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift,
                           config.max_shift)


def noise_like(seeds, channels, h, w):
    """[len(seeds), channels, h, w] fp32 on the CPU: one fixed noise a seed, whatever the batch."""
    return torch.cat([torch.randn(1, channels, h, w, generator=torch.Generator().manual_seed(int(s))) for s in seeds])


@torch.no_grad()
def encode_images(vae, images):
    """[n, 3, H, W] in [0, 1] -> normalised latents [n, 16, H/8, W/8]."""
    z = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mode()
    return (z - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae, z):
    """The inverse: pictures in [0, 1], fp32."""
    z = z.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.decode(z).sample.float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def encode_text(pipe, phrases, length, device):
    """(T5 states [n, length, d], pooled CLIP [n, d])."""
    t5 = pipe.tokenizer_2(phrases, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    clip = pipe.tokenizer(phrases, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return (pipe.text_encoder_2(t5.input_ids.to(device))[0],
            pipe.text_encoder(clip.input_ids.to(device)).pooler_output)


@torch.no_grad()
def euler(pipe, z_source, states, pooled, steps, noise, guidance=3.5):
    """Edited latents [n, 16, h, w] from the source's, in `steps` Euler steps from `noise`."""
    dev, dtype = z_source.device, pipe.transformer.dtype
    n, _, h, w = z_source.shape
    ids = joint_ids(h, w, dev)
    text_ids = torch.zeros(states.shape[1], 3, device=dev)
    tokens, condition = pack(noise.to(dev, dtype)), pack(z_source.to(dtype))
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=dev,
                            mu=shift_mu(scheduler, tokens.shape[1]))
    scheduler.set_begin_index(0)
    strength = torch.full((n,), guidance, device=dev)
    for t in scheduler.timesteps:
        velocity = pipe.transformer(
            hidden_states=torch.cat([tokens, condition], 1), timestep=t.expand(n).to(dtype) / 1000,
            guidance=strength, pooled_projections=pooled, encoder_hidden_states=states, txt_ids=text_ids, img_ids=ids,
            return_dict=False)[0][:, :tokens.shape[1]]
        tokens = scheduler.step(velocity, t, tokens, return_dict=False)[0]
    return unpack(tokens, (h // 2, w // 2))
