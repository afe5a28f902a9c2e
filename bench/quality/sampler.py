# SPDX-License-Identifier: Apache-2.0
"""Plain Euler sampling of a batch of edits, step for step as the family's pipeline does one: the same sigmas, ids,
packing and guidance, without its resizing."""

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from families import family_of

from specedit_kernels import codec_of
from specedit_kernels.sampling.grid import pack, unpack


def shift_mu(scheduler, tokens, family=None, steps=None):
    """The timestep shift for a target of `tokens` tokens: a family's own where it has one, of so many steps."""
    if family is not None and family.shift is not None:
        return family.shift(tokens, steps)
    config = scheduler.config
    return calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )


def noise_like(seeds, channels, h, w):
    """[len(seeds), channels, h, w] fp32 on the CPU: one fixed noise a seed, whatever the batch."""
    return torch.cat([torch.randn(1, channels, h, w, generator=torch.Generator().manual_seed(int(s))) for s in seeds])


@torch.no_grad()
def encode_images(vae, images):
    """[n, 3, H, W] in [0, 1] -> normalised latents [n, 16, H/8, W/8]."""
    return codec_of(vae).encode((images * 2 - 1).to(vae.dtype))


@torch.no_grad()
def decode_latents(vae, z):
    """The inverse: pictures in [0, 1], fp32."""
    return (codec_of(vae).decode(z.to(vae.dtype)).float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def encode_text(pipe, phrases, length, device):
    """A text of the pipeline's family: FLUX's (T5 states [n, length, d], pooled CLIP [n, d]), Qwen's (states, mask)."""
    return family_of(pipe).encode_text(pipe, phrases, length, device)


@torch.no_grad()
def euler(pipe, z_source, states, pooled, steps, noise, guidance=3.5, away=None):
    """Edited latents [n, 16, h, w] from the source's, in `steps` Euler steps from `noise`.

    states, pooled: what encode_text gives. away: (the same of another text, scale of true guidance away from it), or
    None: without."""
    dev, dtype = z_source.device, pipe.transformer.dtype
    n, _, h, w = z_source.shape
    tokens, condition = pack(noise.to(dev, dtype)), pack(z_source.to(dtype))
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    mu = shift_mu(scheduler, tokens.shape[1], family_of(pipe), steps)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=dev, mu=mu)
    # The one step of a schedule with a terminal sigma is 0 / 0 to the scheduler; it begins with noise alone.
    scheduler.sigmas, scheduler.timesteps = scheduler.sigmas.nan_to_num(1.0), scheduler.timesteps.nan_to_num(1000.0)
    scheduler.set_begin_index(0)
    strength = torch.full((n,), guidance, device=dev)
    grid = (h // 2, w // 2)
    for t in scheduler.timesteps:
        at = t.expand(n).to(dtype) / 1000
        velocity, *other = (
            family_of(pipe).velocity(pipe.transformer, tokens, condition, at, grid, text, strength)
            for text in ((states, pooled), *([] if away is None else [away[0]]))
        )
        if other:
            velocity = other[0] + away[1] * (velocity - other[0])
        tokens = scheduler.step(velocity, t, tokens, return_dict=False)[0]
    return unpack(tokens, grid)
