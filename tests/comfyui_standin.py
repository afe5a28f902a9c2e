# SPDX-License-Identifier: Apache-2.0
"""The part of ComfyUI's interface that hosts/comfyui relies on, as recorded of version 0.3.64: names, signatures,
shapes and what they do, written anew on a model of diffusers. bench/hosts/comfyui checks a real ComfyUI."""

import copy
import sys
import types
from types import MappingProxyType

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb

from specedit_kernels.sampling.grid import pack, unpack

NONE = MappingProxyType({})  # where the host has an empty dict for a default


class Interrupted(Exception):
    """comfy.model_management.InterruptProcessingException."""


class Executor:
    """comfy.patcher_extension.WrapperExecutor: a wrapper gets one, and calls it for what is inside."""

    def __init__(self, original, class_obj, wrappers):
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args, **kwargs):
        return Executor(self.original, self.class_obj, self.wrappers[1:]).execute(*args, **kwargs)

    def execute(self, *args, **kwargs):
        return self.wrappers[0](self, *args, **kwargs) if self.wrappers else self.original(*args, **kwargs)


def add_wrapper_with_key(call_type, key, wrapper, transformer_options, is_model_options=False):
    if is_model_options:
        transformer_options = transformer_options.setdefault("transformer_options", {})
    transformer_options.setdefault("wrappers", {}).setdefault(call_type, {}).setdefault(key, []).append(wrapper)


def optimized_attention(q, k, v, heads, mask=None, skip_reshape=False, transformer_options=None):
    override = (transformer_options or {}).get("optimized_attention_override")

    def stock(q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    call = stock if override is None else lambda *args, **kwargs: override(stock, *args, **kwargs)
    return call(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, transformer_options=transformer_options)


class _Processor:
    """Of diffusers' FLUX attention: through the host's."""

    options = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        heads = lambda *xs: [x.unflatten(-1, (-1, attn.head_dim)) for x in xs]  # noqa: E731
        q, k, v = heads(attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        q, k = attn.norm_q(q), attn.norm_k(k)
        text = 0
        if encoder_hidden_states is not None:
            x = encoder_hidden_states
            tq, tk, tv = heads(attn.add_q_proj(x), attn.add_k_proj(x), attn.add_v_proj(x))
            q, k, v = (torch.cat(p, 1) for p in ((attn.norm_added_q(tq), q), (attn.norm_added_k(tk), k), (tv, v)))
            text = x.shape[1]
        q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = optimized_attention(q, k, v, q.shape[1], skip_reshape=True, transformer_options=self.options)
        if encoder_hidden_states is None:
            return out
        return attn.to_out[1](attn.to_out[0](out[:, text:])), attn.to_add_out(out[:, :text])


class Flux(torch.nn.Module):
    """comfy.ldm.flux.model.Flux, on a FluxTransformer2DModel. One picture, one reference."""

    def __init__(self, transformer):
        super().__init__()
        self.inner = transformer
        self.processor = _Processor()
        transformer.set_attn_processor(self.processor)
        config = transformer.config
        self.hidden_size = config.num_attention_heads * config.attention_head_dim
        self.params = types.SimpleNamespace(axes_dim=list(config.axes_dims_rope))
        self.double_blocks, self.single_blocks = transformer.transformer_blocks, transformer.single_transformer_blocks
        self.img_in = transformer.x_embedder
        self.calls = []

    def forward_orig(
        self, img, img_ids, txt, txt_ids, timesteps, y, guidance=None, control=None, transformer_options=NONE,
        attn_mask=None,
    ):  # fmt: skip
        self.calls.append((img.shape, "optimized_attention_override" in transformer_options))
        self.processor.options = transformer_options
        return self.inner(
            hidden_states=img, timestep=timesteps, guidance=guidance, pooled_projections=y, encoder_hidden_states=txt,
            txt_ids=txt_ids[0], img_ids=img_ids[0], return_dict=False,
        )[0]  # fmt: skip

    def forward(
        self, x, timestep, context, y=None, guidance=None, ref_latents=None, control=None, transformer_options=NONE,
        **kwargs,
    ):  # fmt: skip
        wrappers = transformer_options.get("wrappers", {}).get("diffusion_model", {})
        wrappers = [w for several in wrappers.values() for w in several]
        executor = Executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, y, guidance, ref_latents, control, transformer_options, **kwargs)

    def _forward(
        self, x, timestep, context, y=None, guidance=None, ref_latents=None, control=None, transformer_options=NONE,
        **kwargs,
    ):  # fmt: skip
        tokens, ids = [], []
        for number, picture in enumerate([x, *(ref_latents or [])]):
            rows, columns = (side // 2 for side in picture.shape[-2:])
            place = torch.cartesian_prod(torch.arange(float(rows)), torch.arange(float(columns)))
            tokens.append(pack(picture))
            ids.append(F.pad(place, (1, 0), value=float(number)))
        text_ids = x.new_zeros(1, context.shape[1], 3)
        out = self.forward_orig(torch.cat(tokens, 1), torch.cat(ids)[None], context, text_ids, timestep, y, guidance,
                                control, transformer_options, attn_mask=kwargs.get("attention_mask"))  # fmt: skip
        return unpack(out[:, : tokens[0].shape[1]], tuple(side // 2 for side in x.shape[-2:]))


class Sampling:
    """comfy.model_sampling.CONST."""


class Condition:
    """comfy.conds.CONDRegular and its kind."""

    def __init__(self, cond):
        self.cond = cond


class BaseModel:
    """comfy.model_base.Flux."""

    def __init__(self, diffusion_model, scale, shift):
        self.diffusion_model, self.model_sampling = diffusion_model, Sampling()
        self.scale, self.shift = scale, shift

    def process_latent_in(self, latents):
        return (latents - self.shift) * self.scale

    def process_latent_out(self, latents):
        return latents / self.scale + self.shift

    def extra_conds_shapes(self, **kwargs):
        return {}

    def memory_required(self, input_shape, cond_shapes=NONE):
        return 1


class Guider:
    """comfy.samplers.CFGGuider while it samples: what a sampler sees of it. together: both branches in one batch."""

    def __init__(self, base, model_conds, model_options=None, negative=None, cfg=1.0, together=True):
        self.inner_model, self.model_patcher, self.loaded_models = base, object(), []
        self.conds = {"positive": [{"model_conds": model_conds, "uuid": "a"}]}
        if negative is not None:
            self.conds["negative"] = [{"model_conds": negative, "uuid": "b"}]
        self.cfg, self.together = cfg, together
        self.model_options = model_options or {"transformer_options": {}}

    def __call__(self, x, timestep, model_options=NONE, seed=None):
        conds = [self.conds["positive"][0]]
        if "negative" in self.conds and self.cfg != 1:
            conds.append(self.conds["negative"][0])
        batches = [conds] if self.together else [[cond] for cond in conds]
        clean = [y for batch in batches for y in self._of(batch, x, timestep, model_options)]
        return clean[0] if len(clean) == 1 else clean[1] + self.cfg * (clean[0] - clean[1])

    def _of(self, conds, x, timestep, model_options):
        given = {}
        for name in conds[0]["model_conds"]:
            each = [cond["model_conds"][name].cond for cond in conds]
            several = isinstance(each[0], list)
            given[name] = [torch.cat(parts) for parts in zip(*each)] if several else torch.cat(each)
        given["context"] = given.pop("c_crossattn")
        named = dict(uuids=[cond["uuid"] for cond in conds], cond_or_uncond=[0, 1][: len(conds)], sigmas=timestep)
        options, times = model_options["transformer_options"] | named, len(conds)
        x, timestep = x.repeat(times, 1, 1, 1), timestep.repeat(times)
        velocity = self.inner_model.diffusion_model(x, timestep, transformer_options=options, **given)
        return (x - velocity.float() * timestep[:, None, None, None]).chunk(times)

    def sample(self, sampler, noise, sigmas, seed=0, callback=None, denoise_mask=None):
        return sampler.sample(
            self, sigmas, {"model_options": self.model_options, "seed": seed}, callback, noise,
            torch.zeros_like(noise), denoise_mask,
        )  # fmt: skip


class _Layers(torch.nn.Module):
    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


class VAE:
    """comfy.sd.VAE, on an AutoencoderKL: pictures [n, H, W, C] in [0, 1], the VAE's own latents."""

    latent_dim, vae_dtype, device, patcher = 2, torch.float32, torch.device("cpu"), "the VAE"

    def __init__(self, vae):
        self.inner = vae
        decoder, first = vae.decoder, vae.decoder.up_blocks[0]
        mid = _Layers(block_1=decoder.mid_block.resnets[0], attn_1=torch.nn.Identity(),
                      block_2=decoder.mid_block.resnets[1])  # fmt: skip
        for block in (mid, first):
            block.eval()
        up = _Layers(block=_Rows(first.resnets), attn=torch.nn.ModuleList(), upsample=first.upsamplers[0])
        mid.block_1, mid.block_2 = _Row(mid.block_1), _Row(mid.block_2)
        parts = dict(conv_in=decoder.conv_in, mid=mid, up=torch.nn.ModuleList([up]))
        self.first_stage_model = _Layers(decoder=_Layers(**parts))

    def spacial_compression_encode(self):
        return 8

    def memory_used_decode(self, shape, dtype):
        return 1

    def encode(self, pixels):
        return self.inner.encode(pixels.movedim(-1, 1) * 2 - 1).latent_dist.mode()

    def decode(self, latents):
        return (self.inner.decode(latents).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)


class _Row(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, temb=None):
        return self.block(x, temb)


def _Rows(blocks):
    return torch.nn.ModuleList(_Row(block) for block in blocks)


class SamplerCustomAdvanced:
    """comfy_extras.nodes_custom_sampler's."""

    def sample(self, noise, guider, sampler, sigmas, latent_image):
        out = dict(latent_image, samples=guider.sample(sampler, noise, sigmas))
        return out, out


class _Types:
    """comfy_api.latest.io: each type has Input and Output, which keep their arguments."""

    class ComfyNode:
        pass

    class Schema:
        def __init__(self, **fields):
            self.__dict__.update(fields)

    class NodeOutput:
        def __init__(self, *args):
            self.args = args

    def __getattr__(self, name):
        class Input:
            kind = name

            def __init__(self, id, optional=False, **fields):
                self.id, self.optional = id, optional
                self.__dict__.update(fields)

        class Output:
            kind = name

            def __init__(self, **fields):
                self.__dict__.update(fields)

        return types.SimpleNamespace(Input=Input, Output=Output)


class QwenImageTransformer2DModel(torch.nn.Module):
    """comfy.ldm.qwen_image.model's: places its tokens within its forward, by a module of its own."""

    def __init__(self):
        super().__init__()
        self.pe_embedder = torch.nn.Identity()
        self.inner_dim, self.transformer_blocks, self.seen = 32, [None] * 3, []

    def _forward(self, x, timesteps, context, attention_mask=None, guidance=None, ref_latents=None,
                 transformer_options=NONE, control=None, **kwargs):  # fmt: skip
        slots = x.shape[-1] * x.shape[-2] // 4
        ids = self.pe_embedder(torch.full((x.shape[0], context.shape[1] + slots, 3), -99.0))
        self.seen.append((ids, ref_latents, transformer_options.get("optimized_attention_override")))
        return x * 2


def install(monkeypatch):
    """Put the stand-in's modules in sys.modules. Returns what is known of them: models loaded, whether to interrupt."""
    state = types.SimpleNamespace(loaded=[], interrupted=False)

    def throw():
        if state.interrupted:
            raise Interrupted

    def upscale(samples, width, height, method, crop):
        return F.interpolate(samples, size=(height, width), mode="bilinear", antialias=True)

    parts = {
        "samplers": dict(Sampler=type("Sampler", (), {})),
        "model_sampling": dict(CONST=Sampling),
        "model_patcher": dict(create_model_options_clone=copy.deepcopy),
        "patcher_extension": dict(
            WrappersMP=types.SimpleNamespace(DIFFUSION_MODEL="diffusion_model"),
            add_wrapper_with_key=add_wrapper_with_key,
        ),
        "model_management": dict(
            load_models_gpu=lambda models, memory_required=0: state.loaded.append(list(models)),
            throw_exception_if_processing_interrupted=throw,
        ),
        "utils": dict(common_upscale=upscale),
        "ldm": {}, "ldm.flux": {}, "ldm.flux.model": dict(Flux=Flux), "ldm.qwen_image": {},
        "ldm.qwen_image.model": dict(QwenImageTransformer2DModel=QwenImageTransformer2DModel),
    }  # fmt: skip
    modules = {f"comfy.{name}": fields for name, fields in parts.items()} | {"comfy": {}}
    modules["comfy_api"], modules["comfy_extras"] = {}, {}
    modules["comfy_api.latest"] = dict(ComfyExtension=type("ComfyExtension", (), {}), io=_Types())
    modules["comfy_extras.nodes_custom_sampler"] = dict(SamplerCustomAdvanced=SamplerCustomAdvanced)
    for name in sorted(modules):
        module = types.ModuleType(name)
        module.__path__ = []
        module.__dict__.update(modules[name])
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    for name in [n for n in sys.modules if n.startswith("specedit_kernels.hosts.comfyui")]:
        monkeypatch.delitem(sys.modules, name)
    return state
