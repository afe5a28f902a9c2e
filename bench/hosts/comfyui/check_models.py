# SPDX-License-Identifier: Apache-2.0
"""Mixed steps against ComfyUI's own Euler sampler, in its process: python check_models.py COMFYUI_FOLDER

Small FLUX and Qwen-Image with random weights, a batch of two under ComfyUI's CFGGuider. The first picture is edited
whole, so that its sequence, in another order and beside a padded one, shows the very tokens of a plain step: it has to
come out as Euler's. What differs if it does not: position ids, references, guidance, the attention's override.
"""

import sys
import unittest.mock

sys.path.insert(0, sys.argv[1])
sys.argv = [sys.argv[0], "--cpu", "--force-fp32"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.latent_formats  # noqa: E402
import comfy.ldm.wan.vae  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402

from specedit_kernels.engine.config import SpecEditConfig  # noqa: E402
from specedit_kernels.hosts.comfyui import model  # noqa: E402
from specedit_kernels.hosts.comfyui.codec import HostCodec  # noqa: E402
from specedit_kernels.hosts.comfyui.sampler import SpecEditSampler  # noqa: E402

FLUX = dict(
    image_model="flux", in_channels=16, out_channels=16, patch_size=2, vec_in_dim=24, context_in_dim=40, hidden_size=64,
    mlp_ratio=2.0, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[8, 12, 12], theta=10000, qkv_bias=True,
    guidance_embed=True,
)  # fmt: skip
QWEN = dict(
    image_model="qwen_image", num_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=40,
    in_channels=64, out_channels=16, axes_dims_rope=[8, 12, 12],
)  # fmt: skip
SIGMAS = torch.tensor([1.0, 0.8, 0.5, 0.0])
TOLERANCE = 1e-4


class PooledPictures:
    """Stands for a VAE: the stages of this check ask for pictures, and look at none."""

    def __init__(self, frames: bool):
        self.latent_dim = 3 if frames else 2

    def spacial_compression_encode(self):
        return 8

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8).mean(1, keepdim=True).repeat(1, 16, 1, 1)
        return small[:, :, None] if self.latent_dim == 3 else small

    def decode(self, latents):
        return torch.zeros(1, 8 * latents.shape[-2], 8 * latents.shape[-1], 3)


right = model.reference_places


def misplaced(references, method):
    return [(index, row + 2, column) for index, row, column in right(references, method)]


def small_model(kind, unet_config):
    torch.manual_seed(0)
    config = kind(unet_config)
    config.set_inference_dtype(torch.float32, None)
    made = config.get_model({}, "")
    for name, parameter in made.diffusion_model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif "norm" in name:  # of queries and keys: attention that tells places apart
            torch.nn.init.constant_(parameter, 2.5)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    return comfy.model_patcher.ModelPatcher(made, torch.device("cpu"), torch.device("cpu"))


def conditioning(length, width, references, method):
    fields = {"pooled_output": torch.randn(1, 24), "guidance": 2.5, "reference_latents": references}
    if method is not None:
        fields["reference_latents_method"] = method
    return [[torch.randn(1, length, width), fields]]


def check(name, patcher, frames, method, sizes, cfg, lengths, blind=False):
    torch.manual_seed(1)
    shape = (2, 16, 1, 12, 8) if frames else (2, 16, 12, 8)
    references = [torch.randn(1, *shape[1:-2], *size) for size in sizes]
    positive, negative = (conditioning(n, 40, references, method) for n in lengths)
    if blind:
        del negative[0][1]["reference_latents"]
    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    noise, empty = torch.randn(shape), torch.zeros(shape)
    mask = torch.zeros(2, 96, 64)
    mask[0], mask[1, :32, :32] = 1, 1
    config = SpecEditConfig(stages=(0, len(SIGMAS) - 1, 0), finish="locked", kv_refresh=1, max_active=1.0)
    ours = SpecEditSampler(config, PooledPictures(frames), torch.rand(1, 96, 64, 3), mask)
    euler = comfy.samplers.sampler_object("euler")
    plain, found = (guider.sample(noise, empty, s, SIGMAS, disable_pbar=True, seed=5) for s in (euler, ours))
    off, moved = float((plain[0] - found[0]).abs().max()), float((plain[1] - found[1]).abs().max())
    # the check sees a token that stands two rows from its place
    with unittest.mock.patch.object(model, "reference_places", misplaced):
        wrong = float((guider.sample(noise, empty, ours, SIGMAS, disable_pbar=True, seed=5)[0] - plain[0]).abs().max())
    good = off < TOLERANCE and moved > 100 * TOLERANCE and wrong > 10 * TOLERANCE
    kind = f"{name}, {method or 'no method'}, references {sizes}, cfg {cfg}, text {lengths}"
    kind += ", negative without references" if blind else ""
    print(f"{'ok  ' if good else 'FAIL'} {kind}: {off:.1e} off Euler (edited in part: {moved:.1e}, misplaced"
          f" references: {wrong:.1e})")  # fmt: skip
    return good


def check_video_vae():
    """The features of Qwen-Image's VAE: the rest of its decoder makes the picture of them."""
    torch.manual_seed(2)
    config = dict(dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
                  temperal_downsample=[False, True, True], dropout=0.0)  # fmt: skip
    weights = comfy.ldm.wan.vae.WanVAE(**config).state_dict()
    for name, weight in weights.items():  # which the host leaves uninitialised
        wide = weight.ndim > 1 and "gamma" not in name
        weight.copy_(torch.randn_like(weight) * weight[0].numel() ** -0.5 if wide else "gamma" in name)
    vae = comfy.sd.VAE(weights, dtype=torch.float32)
    space = comfy.latent_formats.Wan21()
    codec = HostCodec(vae, torch.device("cpu"), space.process_in, space.process_out)
    pixels = torch.rand(2, 3, 64, 32) * 2 - 1
    latents = codec.encode(pixels)
    features = codec.features(latents)
    decoder, x = vae.first_stage_model.decoder, features[-1][:, :, None]
    for layer in [*decoder.upsamples[4:], *decoder.head]:
        x = layer(x)
    off = float((x[:, :, 0].clamp(-1, 1) - codec.decode(latents)).abs().max())
    good = off < TOLERANCE and latents.shape == (2, 16, 8, 4) and features[-1].shape[-2:] == (16, 8)
    print(f"{'ok  ' if good else 'FAIL'} Qwen-Image's VAE: decoded from its features {off:.1e} off")
    return good


@torch.inference_mode()
def main():
    good = check_video_vae()
    for name, kind, unet_config, frames in (
        ("FLUX", comfy.supported_models.Flux, FLUX, False),
        ("Qwen-Image", comfy.supported_models.QwenImage, QWEN, True),
    ):
        patcher = small_model(kind, unet_config)
        for method in (None, "index", "offset"):
            for sizes in ([(12, 8)], [(12, 8), (8, 12), (10, 6)], [(8, 12)]):
                good &= check(name, patcher, frames, method, sizes, 1.0, (7, 7))
        good &= check(name, patcher, frames, None, [(12, 8)], 2.5, (7, 7))  # both branches in one batch
        good &= check(name, patcher, frames, None, [(12, 8), (8, 12)], 2.5, (7, 4))
        good &= check(name, patcher, frames, None, [(12, 8), (8, 12)], 2.5, (7, 7), blind=True)
    if not good:
        raise SystemExit("failed")


main()
