# SPDX-License-Identifier: Apache-2.0
"""Nodes for check.py, in ComfyUI's custom_nodes: a FLUX of the tiny Kontext's size loads with the stock loader, and its
VAE, its encoded prompts and given sigmas with nodes of their own. For tests; nobody's workflow needs them."""

import comfy.model_detection
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io

_stock = comfy.model_detection.detect_unet_config


def _with_tiny(state_dict, key_prefix, *args, **kwargs):
    """The host takes the width and the heads of a FLUX for granted."""
    found = _stock(state_dict, key_prefix, *args, **kwargs)
    weight = state_dict.get(f"{key_prefix}img_in.weight")
    if found and found.get("image_model") == "flux" and weight is not None and weight.shape[0] == 320:
        found |= dict(hidden_size=320, num_heads=5, axes_dim=[8, 28, 28], context_in_dim=256)
    return found


comfy.model_detection.detect_unet_config = _with_tiny


class TinyVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="TinyVAE", category="tests", inputs=[], outputs=[io.Vae.Output()])

    @classmethod
    def execute(cls):
        config = dict(double_z=True, z_channels=16, resolution=256, in_channels=3, out_ch=3, ch=32,
                      ch_mult=[1, 2, 3, 3], num_res_blocks=1, attn_resolutions=[], dropout=0.0)  # fmt: skip
        weights = comfy.utils.load_torch_file(folder_paths.get_full_path("vae", "tiny_kontext.safetensors"))
        vae = comfy.sd.VAE(weights, config={"params": dict(ddconfig=config, embed_dim=16)}, dtype=torch.float32)
        vae.latent_channels = 16
        for module in vae.first_stage_model.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.num_groups = 8
        return io.NodeOutput(vae)


class TinyPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TinyPrompt", category="tests", inputs=[io.Int.Input("number")], outputs=[io.Conditioning.Output()]
        )

    @classmethod
    def execute(cls, number):
        path = folder_paths.get_full_path("text_encoders", "tiny_kontext_prompts.safetensors")
        weights = comfy.utils.load_torch_file(path)
        return io.NodeOutput([[weights[f"{number}.embeds"], {"pooled_output": weights[f"{number}.pooled"]}]])


class TinySigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TinySigmas", category="tests", inputs=[io.String.Input("sigmas")], outputs=[io.Sigmas.Output()]
        )

    @classmethod
    def execute(cls, sigmas):
        return io.NodeOutput(torch.tensor([float(sigma) for sigma in sigmas.split()]))


class TinyExtension(ComfyExtension):
    async def get_node_list(self):
        return [TinyVAE, TinyPrompt, TinySigmas]


async def comfy_entrypoint():
    return TinyExtension()
