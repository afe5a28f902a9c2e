# SPDX-License-Identifier: Apache-2.0
"""The shipped tiny Kontext in ComfyUI's key names: python bench/hosts/comfyui/convert.py FOLDER

Writes into the folder, which is laid out like ComfyUI's own: models/diffusion_models/tiny_kontext.safetensors,
models/vae/tiny_kontext.safetensors, models/loras/tiny_kontext_lora.safetensors (random, to see that a LoRA takes
effect) and models/text_encoders/tiny_kontext_prompts.safetensors (encoded prompts: ComfyUI's text encoders come in
their full size alone). Nothing of it is committed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import FluxKontextPipeline
from safetensors.torch import save_file
from torch import Tensor

SHIPPED = Path(__file__).resolve().parents[3] / "specedit_kernels/assets/tiny_kontext"
# of comfy.latent_formats.Flux; the tiny VAE has others, which its 1x1 convolutions make up for
HOST_SCALE, HOST_SHIFT = 0.3611, 0.1159

Weights = dict[str, Tensor]


def _linear(out: Weights, name: str, source: Weights, *names: str) -> None:
    for kind in ("weight", "bias"):
        out[f"{name}.{kind}"] = torch.cat([source[f"{n}.{kind}"] for n in names])


def transformer_weights(w: Weights) -> Weights:
    """FluxTransformer2DModel's weights under FLUX's own names."""
    out: Weights = {}
    _linear(out, "img_in", w, "x_embedder")
    _linear(out, "txt_in", w, "context_embedder")
    embedders = {"time_in": "timestep", "guidance_in": "guidance", "vector_in": "text"}
    for ours, theirs in embedders.items():
        _linear(out, f"{ours}.in_layer", w, f"time_text_embed.{theirs}_embedder.linear_1")
        _linear(out, f"{ours}.out_layer", w, f"time_text_embed.{theirs}_embedder.linear_2")
    blocks = {name.split(".")[1] for name in w if name.startswith("transformer_blocks.")}
    for i in blocks:
        a, b = f"double_blocks.{i}", f"transformer_blocks.{i}"
        streams = {"img": ("to_{}", "norm_{}", "to_out.0", "ff", "norm1"),
                   "txt": ("add_{}_proj", "norm_added_{}", "to_add_out", "ff_context", "norm1_context")}  # fmt: skip
        for stream, (qkv, norm, proj, mlp, mod) in streams.items():
            _linear(out, f"{a}.{stream}_attn.qkv", w, *(f"{b}.attn.{qkv.format(x)}" for x in "qkv"))
            for x, long in (("q", "query"), ("k", "key")):
                out[f"{a}.{stream}_attn.norm.{long}_norm.scale"] = w[f"{b}.attn.{norm.format(x)}.weight"]
            _linear(out, f"{a}.{stream}_attn.proj", w, f"{b}.attn.{proj}")
            _linear(out, f"{a}.{stream}_mlp.0", w, f"{b}.{mlp}.net.0.proj")
            _linear(out, f"{a}.{stream}_mlp.2", w, f"{b}.{mlp}.net.2")
            _linear(out, f"{a}.{stream}_mod.lin", w, f"{b}.{mod}.linear")
    blocks = {name.split(".")[1] for name in w if name.startswith("single_transformer_blocks.")}
    for i in blocks:
        a, b = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        _linear(out, f"{a}.linear1", w, *(f"{b}.attn.to_{x}" for x in "qkv"), f"{b}.proj_mlp")
        _linear(out, f"{a}.linear2", w, f"{b}.proj_out")
        _linear(out, f"{a}.modulation.lin", w, f"{b}.norm.linear")
        for x, long in (("q", "query"), ("k", "key")):
            out[f"{a}.norm.{long}_norm.scale"] = w[f"{b}.attn.norm_{x}.weight"]
    _linear(out, "final_layer.linear", w, "proj_out")
    for kind in ("weight", "bias"):
        # scale and shift stand the other way round
        scale, shift = w[f"norm_out.linear.{kind}"].chunk(2)
        out[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    return {name: x.contiguous() for name, x in out.items()}


def vae_weights(w: Weights, scale: float, shift: float) -> Weights:
    """AutoencoderKL's weights under the names of its first implementation, with the host's scale and shift."""
    levels = 1 + max(int(name.split(".")[2]) for name in w if name.startswith("decoder.up_blocks."))
    out: Weights = {}
    for name, x in w.items():
        side, *rest = name.split(".")
        path = ".".join(rest)
        path = path.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        path = path.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        path = path.replace("samplers.0.", "sample.").replace(".resnets.", ".block.")
        parts = path.split(".")
        if parts[0] == "down_blocks":
            parts[0] = "down"
        if parts[0] == "up_blocks":
            parts[:2] = ["up", str(levels - 1 - int(parts[1]))]
        out[".".join([side, *parts])] = x
    channels = w["decoder.conv_in.weight"].shape[0]
    for side in ("encoder", "decoder"):  # an attention that adds nothing
        at = f"{side}.mid.attn_1"
        out[f"{at}.norm.weight"], out[f"{at}.norm.bias"] = torch.ones(channels), torch.zeros(channels)
        for part in ("q", "k", "v", "proj_out"):
            out[f"{at}.{part}.weight"] = torch.zeros(channels, channels, 1, 1)
            out[f"{at}.{part}.bias"] = torch.zeros(channels)
    latent = w["decoder.conv_in.weight"].shape[1]
    times = scale / HOST_SCALE
    means, deviations = torch.eye(2 * latent).chunk(2)
    out["quant_conv.weight"] = torch.cat([means * times, deviations])[..., None, None]
    out["quant_conv.bias"] = torch.cat([torch.full((latent,), HOST_SHIFT - times * shift), torch.zeros(latent)])
    out["post_quant_conv.weight"] = (torch.eye(latent) / times)[..., None, None]
    out["post_quant_conv.bias"] = torch.full((latent,), shift - HOST_SHIFT / times)
    return {name: x.float().contiguous() for name, x in out.items()}


def lora_weights(w: Weights, rank: int = 4, size: float = 0.08) -> Weights:
    """A random LoRA in diffusers' format on some layers of both kinds of blocks."""
    generator = torch.Generator().manual_seed(20)
    out: Weights = {}
    for name in ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v", "transformer_blocks.0.ff.net.2",
                 "single_transformer_blocks.2.attn.to_v", "single_transformer_blocks.5.proj_out"):  # fmt: skip
        rows, columns = w[f"{name}.weight"].shape
        out[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * size
        out[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * size
    return out


def prompt_weights(pipe: FluxKontextPipeline, prompts: list[str]) -> Weights:
    """Encoded prompts: "0.embeds" [1, T, E], "0.pooled" [1, P], ..."""
    out: Weights = {}
    for i, prompt in enumerate(prompts):
        embeds, pooled, _ = pipe.encode_prompt(prompt, prompt_2=None, max_sequence_length=64)
        out[f"{i}.embeds"], out[f"{i}.pooled"] = embeds.float().contiguous(), pooled.float().contiguous()
    return out


def write(folder: Path, pipe: FluxKontextPipeline, prompts: list[str]) -> None:
    """All files for one pipeline."""
    weights = {name: x.float() for name, x in pipe.transformer.state_dict().items()}
    config = pipe.vae.config
    files = {
        "diffusion_models/tiny_kontext": transformer_weights(weights),
        "vae/tiny_kontext": vae_weights(pipe.vae.state_dict(), config.scaling_factor, config.shift_factor),
        "loras/tiny_kontext_lora": lora_weights(weights),
        "text_encoders/tiny_kontext_prompts": prompt_weights(pipe, prompts),
    }
    for name, tensors in files.items():
        path = folder / "models" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    shipped = FluxKontextPipeline.from_pretrained(SHIPPED, torch_dtype=torch.float32)
    write(Path(sys.argv[1]), shipped, (SHIPPED.parent / "example.txt").read_text().splitlines()[:1])
