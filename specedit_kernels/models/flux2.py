# SPDX-License-Identifier: Apache-2.0
"""FLUX.2: klein 4B and 9B (Flux2KleinPipeline) and dev (Flux2Pipeline): all that the engine cannot know of them.

In order: the transformer's fused forward, the attention processors, the codec, what the stages ask of the model, the
pipelines. What FLUX.2 shares with FLUX.1-Kontext is that file's.

Of its own FLUX.2 has position ids on four axes (picture, row, column, text token), one modulation for all blocks of a
kind, single blocks whose q, k, v and MLP are one product, a gated MLP (SwiGLU), no biases, and latents that are
normalised channel by channel after packing.

Thresholds are not calibrated for it: drafts are judged by the decoder's features with those of the tiny FLUX editor.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Pipeline
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2AttnProcessor,
    Flux2FeedForward,
    Flux2Modulation,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
    Flux2SingleTransformerBlock,
    Flux2SwiGLU,
    Flux2Transformer2DModel,
    Flux2TransformerBlock,
)
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .. import ops
from ..engine import fp8
from ..engine._diffusers import through
from ..engine.attention import SpecEditAttnProcessor, joint_attention, with_layout
from ..engine.autoencoder import KLCodec, decoder_features, with_fused_norms
from ..engine.fp8 import Rows
from ..engine.fused import called, compiled, linear, linear_of_each, modulated, of_both
from ..engine.low_rank import active_serial
from ..engine.model import EditModel, Text
from ..engine.pipeline import Call, SpecEditMixin, preprocess
from ..engine.registry import Model, register
from ..engine.runner import StepRunner
from ..engine.sequence import Kept, MixedSequence, StepLayout, Stream, attention, embedded
from ..sampling.grid import BLOCK, PATCH, Grid
from .flux_kontext import Blocks, FluxKontextModel, FluxLayout, FusedFluxModel, SpecEditFluxAttnProcessor

MAX_AREA = 1024 * 1024  # pixels of a reference, and of the output where no size is given
PICTURE_STEP = 10  # between the ids of two pictures


def modulation(
    transformer: Flux2Transformer2DModel, timestep: Tensor, guidance: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Shifts, scales and gates of double blocks' image and text, of single blocks and of the last norm: [R, 17 C].

    timestep: [R] in [0, 1000]. guidance: [R] or None.
    """
    # the roundings of the pipeline and of the model's forward
    at = (timestep.to(dtype) / 1000) * 1000
    temb = transformer.time_guidance_embed(at, None if guidance is None else guidance.to(dtype) * 1000)
    last = called(transformer.norm_out.linear, F.silu(temb))
    return torch.cat([*(each(temb) for each in _modulations(transformer)), last], dim=-1)


def _modulations(transformer: Flux2Transformer2DModel) -> tuple[Flux2Modulation, ...]:
    return (
        transformer.double_stream_modulation_img,
        transformer.double_stream_modulation_txt,
        transformer.single_stream_modulation,
    )


def replaced(transformer: Flux2Transformer2DModel) -> Iterable[tuple[torch.nn.Module, type]]:
    """Every module whose forward `fused_forward` stands for, with the class that it must have. All others are called;
    linear layers too, where they are more than a weight."""
    yield transformer, Flux2Transformer2DModel
    for block in transformer.transformer_blocks:
        yield block, Flux2TransformerBlock
        yield block.attn, Flux2Attention
        for norm in (block.norm1, block.norm1_context, block.norm2, block.norm2_context):
            yield norm, torch.nn.LayerNorm
        for norm in (block.attn.norm_q, block.attn.norm_k, block.attn.norm_added_q, block.attn.norm_added_k):
            yield norm, torch.nn.RMSNorm
        for ff in (block.ff, block.ff_context):
            yield from ((ff, Flux2FeedForward), (ff.act_fn, Flux2SwiGLU), (ff.act_fn.gate_fn, torch.nn.SiLU))
    for block in transformer.single_transformer_blocks:
        yield block, Flux2SingleTransformerBlock
        yield block.attn, Flux2ParallelSelfAttention
        yield block.norm, torch.nn.LayerNorm
        yield from ((block.attn.norm_q, torch.nn.RMSNorm), (block.attn.norm_k, torch.nn.RMSNorm))
        yield from ((block.attn.mlp_act_fn, Flux2SwiGLU), (block.attn.mlp_act_fn.gate_fn, torch.nn.SiLU))
    norm = transformer.norm_out
    yield from ((norm, AdaLayerNormContinuous), (norm.silu, torch.nn.SiLU), (norm.norm, torch.nn.LayerNorm))


def _swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(value)


def _feed_forward(ff: Flux2FeedForward, x: Tensor | Rows) -> Tensor:
    return linear(ff.linear_out, _swiglu(linear(ff.linear_in, x)))


def _heads(x: Tensor, attn: torch.nn.Module) -> Tensor:
    # -1 for the heads: tensor parallelism shards them
    return x.unflatten(-1, (-1, attn.head_dim))


def _inputs(attn: Flux2Attention, text: bool) -> tuple[torch.nn.Module, ...]:
    """The layers of q, k and v of image tokens or of text in a double block: one where they are joined."""
    if attn.fused_projections:
        return (attn.to_added_qkv if text else attn.to_qkv,)
    return (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if text else (attn.to_q, attn.to_k, attn.to_v)


def _project(attn: Flux2Attention, x: Tensor | Rows, text: bool) -> list[Tensor]:
    """q, k and v [B, N, H, D] of what `_inputs` take."""
    parts = linear_of_each(_inputs(attn, text), x)
    return [_heads(part, attn) for part in (parts[0].chunk(3, dim=-1) if attn.fused_projections else parts)]


def _parted(attn: Flux2ParallelSelfAttention, y: Tensor) -> tuple[list[Tensor], Tensor]:
    """(q, k and v [B, N, H, D], what the MLP's activation takes) of a single block's one product."""
    qkv, mlp = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
    at = y.shape[-1] * qkv // (qkv + mlp)  # a shard has its share of both
    return [_heads(part, attn) for part in y[..., :at].chunk(3, dim=-1)], y[..., at:]


def double_block(
    block: Flux2TransformerBlock, x: Tensor, sequence: MixedSequence, kept: Kept | None, image_mod: Tensor,
    text_mod: Tensor,
) -> Tensor | None:  # fmt: skip
    """Flux2TransformerBlock on text and image tokens x [B, N, C], in place. Returns what `watched_mass` does.

    kept: where its keys and values go, None to forget them. image_mod, text_mod: [B, 6 C].
    """
    attn, n = block.attn, sequence.own[0]
    text, image = x[:, :n], x[:, n:]
    (t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2) = text_mod.chunk(6, dim=1)
    (i_shift, i_scale, i_gate, i_shift2, i_scale2, i_gate2) = image_mod.chunk(6, dim=1)
    streams = []
    if sequence.text:  # else its keys and values are kept ones
        parts = []
        if n:
            text_in = modulated(text, t_scale, t_shift, block.norm1_context.eps, _inputs(attn, text=True))
            parts = _project(attn, text_in, text=True)
        streams.append(Stream(slice(0, sequence.text), parts, attn.norm_added_q, attn.norm_added_k))
    parts = []
    if image.shape[1]:
        image_in = modulated(image, i_scale, i_shift, block.norm1.eps, _inputs(attn, text=False))
        parts = _project(attn, image_in, text=False)
    streams.append(Stream(slice(sequence.text, None), parts, attn.norm_q, attn.norm_k))
    out, seen = attention(streams, kept, sequence)
    del streams, parts  # the MLP needs their memory
    if n:
        ops.gated_residual_add_(text, linear(attn.to_add_out, out[:, :n]), t_gate)
        text_in = modulated(text, t_scale2, t_shift2, block.norm2_context.eps, [block.ff_context.linear_in])
        ops.gated_residual_add_(text, _feed_forward(block.ff_context, text_in), t_gate2)
    if image.shape[1]:
        ops.gated_residual_add_(image, attn.to_out[1](linear(attn.to_out[0], out[:, n:])), i_gate)
        image_in = modulated(image, i_scale2, i_shift2, block.norm2.eps, [block.ff.linear_in])
        ops.gated_residual_add_(image, _feed_forward(block.ff, image_in), i_gate2)
    return seen


def single_block(
    block: Flux2SingleTransformerBlock, x: Tensor, sequence: MixedSequence, kept: Kept | None, mod: Tensor
) -> Tensor | None:
    """Flux2SingleTransformerBlock on text and image tokens x [B, N, C], in place; kept as above, mod: [B, 3 C]."""
    attn = block.attn
    shift, scale, gate = mod.chunk(3, dim=1)
    y = modulated(x, scale, shift, block.norm.eps, [attn.to_qkv_mlp_proj])
    parts, hidden = _parted(attn, linear(attn.to_qkv_mlp_proj, y))
    attended, seen = attention([Stream(slice(None), parts, attn.norm_q, attn.norm_k)], kept, sequence)
    ops.gated_residual_add_(x, of_both(attn.to_out, attended, _swiglu(hidden)), gate)
    return seen


BLOCKS: Blocks = (double_block, single_block)


@functools.cache
def compiled_blocks() -> Blocks:
    double, single = map(compiled, BLOCKS)
    return double, single


def fused_forward(
    transformer: Flux2Transformer2DModel,
    tokens: Tensor,
    embeds: Tensor,
    modulation: Tensor,
    sequence: MixedSequence,
    cache: list[Kept] | None = None,
    blocks: Blocks = BLOCKS,
    watch: tuple[int, list[Tensor]] | None = None,
) -> Tensor:
    """Velocity of image tokens [B, S, 4C]: Flux2Transformer2DModel.forward. The arguments are flux_kontext's."""
    text_in, image_in = (functools.partial(called, x) for x in (transformer.context_embedder, transformer.x_embedder))
    x = embedded(text_in, image_in, embeds, tokens, sequence)
    layers = [*_modulations(transformer), transformer.norm_out]
    of_image, of_text, of_single, of_last = modulation.split([layer.linear.out_features for layer in layers], dim=-1)
    double, single = blocks
    for i, layer in enumerate([*transformer.transformer_blocks, *transformer.single_transformer_blocks]):
        kept = None if cache is None else cache[i]
        known = replace(sequence, watched=True) if watch and i == watch[0] else sequence
        if i < len(transformer.transformer_blocks):
            seen = double(layer, x, known, kept, of_image, of_text)
        else:
            seen = single(layer, x, known, kept, of_single)
        if watch and seen is not None:
            watch[1].append(seen)
        if x.dtype == torch.float16:
            # sums beyond its range end at its ends, as in the blocks of diffusers
            x.clip_(-65504, 65504)
    scale, shift = of_last.chunk(2, dim=1)
    image = ops.adaln_modulate(x[:, sequence.own[0] :], scale, shift, eps=transformer.norm_out.norm.eps)
    return sequence.whole_image(called(transformer.proj_out, image))


class SpecEditFlux2SingleAttnProcessor(SpecEditAttnProcessor):
    """For Flux2ParallelSelfAttnProcessor; `specedit_layout` is the mixed sequence's."""

    def __call__(
        self,
        attn: Flux2ParallelSelfAttention,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        specedit_layout: StepLayout | None = None,
    ) -> Tensor:
        if specedit_layout is None:
            return self.inner(attn, hidden_states, attention_mask, image_rotary_emb)
        (q, k, v), hidden = _parted(attn, attn.to_qkv_mlp_proj(hidden_states))
        attended = joint_attention(self, None, (attn.norm_q(q), attn.norm_k(k), v), specedit_layout)
        return attn.to_out(torch.cat([attended, attn.mlp_act_fn(hidden)], dim=-1))


class Flux2Codec(KLCodec):
    """AutoencoderKLFlux2: latents are normalised by the statistics of its batch norm, each channel of a packed token
    by its own. They are kept as a latent image [B, C, H, W] all the same, which `pack` makes those tokens of."""

    def _norm(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, in the latents' dtype, [1, 4C, 1, 1]."""
        bn = self.vae.bn
        mean, variance = (x.view(1, -1, 1, 1) for x in (bn.running_mean, bn.running_var))
        spread = torch.sqrt(variance + self.vae.config.batch_norm_eps)
        return mean.to(latents.device, latents.dtype), spread.to(latents.device, latents.dtype)

    def encode(self, pixels: Tensor) -> Tensor:
        latents = F.pixel_unshuffle(self.vae.encode(pixels).latent_dist.mode(), PATCH)
        mean, spread = self._norm(latents)
        return F.pixel_shuffle((latents - mean) / spread, PATCH)

    def unscaled(self, latents: Tensor) -> Tensor:
        """The autoencoder's own latents [B, C, H, W] of normalised ones."""
        latents = F.pixel_unshuffle(latents, PATCH)
        mean, spread = self._norm(latents)
        return F.pixel_shuffle(latents * spread + mean, PATCH)

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(self.unscaled(latents).to(self.vae.dtype), return_dict=False)[0]

    def features(self, latents: Tensor) -> list[Tensor]:
        def run(x: Tensor) -> list[Tensor]:
            if self.vae.post_quant_conv is not None:
                x = self.vae.post_quant_conv(x)
            return decoder_features(self.vae.decoder, x)

        return through(self.vae, run, self.unscaled(latents).to(self.vae.dtype))

    def fused(self) -> Flux2Codec:
        return Flux2Codec(with_fused_norms(self.vae))


@dataclass
class Flux2Text(Text):
    """embeds [B, T, E], text_ids fp32 [T, 4]."""

    text_ids: Tensor


class Flux2Model(FluxKontextModel):
    """Flux2Transformer2DModel with AutoencoderKLFlux2."""

    def ids(self, text: Flux2Text, positions: Tensor) -> Tensor:
        """(10 x the picture's number, row, column, 0)."""
        picture, place = positions[:, :1], positions[:, 1:]
        return torch.cat([PICTURE_STEP * picture, place, torch.zeros_like(picture)], dim=1)

    def flops(self, text: Flux2Text, tokens: int, keys: int | None = None, lock_text: bool = False) -> int:
        """With the gated MLP's 6 d^2 x its ratio for each token, in place of 16 d^2."""
        config, length = self.transformer.config, 0 if lock_text else text.embeds.shape[1]
        dim = config.num_attention_heads * config.attention_head_dim
        more = round((6 * config.mlp_ratio - 16) * dim * dim) * (length + tokens) * self.blocks
        return super().flops(text, tokens, keys, lock_text) + more

    def velocity(self, text: Flux2Text, tokens: Tensor, conditioning: Tensor, layout: FluxLayout) -> Tensor:
        kwargs = dict(self.attention_kwargs)
        start = 0 if layout.attention is None else layout.attention.start
        attention = self.shared(layout.attention, text.embeds.shape[1] - start, tokens.shape[1])
        if attention is not None:
            kwargs["specedit_layout"] = attention
        ids = text.text_ids[start:], layout.ids
        if self.ranks is not None:  # hooks of diffusers expect an axis of samples
            ids = ids[0][None], ids[1][None]
        with with_layout(self.transformer, attention):
            return self.transformer(
                hidden_states=tokens,
                timestep=conditioning.expand(tokens.shape[0]).to(tokens.dtype) / 1000,
                guidance=self.guidance,
                encoder_hidden_states=text.embeds[:, start:],
                txt_ids=ids[0],
                img_ids=ids[1],
                joint_attention_kwargs=kwargs or None,
                return_dict=False,
            )[0]


class FusedFlux2Model(FusedFluxModel, Flux2Model):
    """The same model through `fused_forward`, its steps and its autoencoder launched by a runner."""

    forward = staticmethod(fused_forward)

    @property
    def _blocks(self) -> Blocks:
        # a compiled block does not know of changed weights, nor of those in fp8
        apart = self.runner.name != "compile" or active_serial() or fp8.is_active()
        return BLOCKS if apart else compiled_blocks()

    def timestep_conditioning(self, text: Flux2Text, timesteps: Tensor) -> Iterable[Tensor]:
        """The modulation of all blocks, [B, ...] for each timestep: it depends on nothing but the step and guidance."""
        batch = text.embeds.shape[0]
        guidance = None if self.guidance is None else self.guidance[:1].expand(len(timesteps))
        with self._scaled():
            found = modulation(self.transformer, timesteps, guidance, text.embeds.dtype)
        return [row.expand(batch, -1) for row in found.split(1)]


class _SpecEditFlux2Mixin(SpecEditMixin):
    """What both FLUX.2 pipelines share."""

    ARGUMENTS = {"max_area": None}
    TEXT = ("prompt", "prompt_embeds")
    KWARGS = "attention_kwargs"
    PIXELS = False
    TEXT_TO_IMAGE = True
    EDITED = 1
    SEVERAL_GPUS = True

    def _shift(self, tokens: int, steps: int) -> float:
        return compute_empirical_mu(image_seq_len=tokens, num_steps=steps)

    def _size(self, call: Call) -> tuple[int, int]:
        """By the stock pipeline's rules, in whole blocks. Keeps `call.references`, [(picture, its (height, width))]."""
        area = MAX_AREA if call.max_area is None else call.max_area
        token = self.vae_scale_factor * PATCH
        call.references = []
        for picture in call.image if isinstance(call.image, list) else [call.image]:
            self.image_processor.check_image_input(picture)
            if picture.width * picture.height > area:
                picture = self.image_processor._resize_to_target_area(picture, area)
            call.references.append((picture, tuple(side // token * token for side in (picture.height, picture.width))))
        own = call.references[0][1]
        multiple = token * BLOCK
        fitted = tuple(
            max((asked or side) // multiple, 1) * multiple for asked, side in zip((call.height, call.width), own)
        )
        if call.height is None and call.width is None:
            # the edited picture loses a row or a column of tokens, and stays on the output's grid
            call.references[0] = call.references[0][0], fitted
        return fitted

    def _pictures(self, call: Call, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        # what comes back at the source's size has to show all of it
        usual = "default" if call.output_size == "source" else "crop"

        def pixels_of(picture: PIL.Image.Image, size: tuple[int, int], mode: str = usual) -> Tensor:
            if mode == "crop":
                picture = self.image_processor.resize(picture, *size, resize_mode=mode)
            return preprocess(self.image_processor, picture, *size, device)

        size = (call.height, call.width)
        seen = [pixels_of(*reference) for reference in call.references]
        aligned = call.references[0][1] == size
        return seen[0] if aligned else pixels_of(call.references[0][0], size, "default"), seen

    def _encode_text(self, call: Call, device: torch.device, **fields: Any) -> Flux2Text:
        embeds, ids = self.encode_prompt(
            **fields,
            device=device,
            num_images_per_prompt=call.num_images_per_prompt,
            max_sequence_length=call.max_sequence_length,
            text_encoder_out_layers=call.text_encoder_out_layers,
        )
        return Flux2Text(embeds, ids[0].float())

    def _start_noise(self, latents, shape, grid: Grid, generator, device, dtype) -> Tensor:
        # drawn packed: the order of the numbers is another
        batch, channels = shape[0], shape[1] * PATCH * PATCH
        expected = (batch, channels, *grid)
        if latents is None:
            latents = randn_tensor(expected, generator=generator, device=device, dtype=dtype)
        elif tuple(latents.shape) != expected:
            raise ValueError(f"latents: expected {expected}, got {tuple(latents.shape)}")
        return F.pixel_shuffle(latents.to(device=device, dtype=dtype).float(), PATCH)

    def _model(
        self, runner: StepRunner | None, guidance: Tensor | None, attention_kwargs: dict[str, Any]
    ) -> Flux2Model:
        parts = (self.transformer, self.vae, guidance, attention_kwargs)
        return Flux2Model(*parts) if runner is None else FusedFlux2Model(*parts, runner)


class SpecEditFlux2KleinPipeline(_SpecEditFlux2Mixin, Flux2KleinPipeline):
    """Flux2KleinPipeline (FLUX.2-klein 4B and 9B, distilled and base) with SpecEdit: an edit computes at full
    resolution only where the picture changes.

    Made by `from_pretrained` or `from_pipe` like any pipeline; weights are never touched. Differences in the call:

    specedit: a SpecEditConfig; None takes the pipeline's default; False runs the stock pipeline's own call, untouched.
        For the distilled weights' 4 steps SpecEditConfig(preset=4, quality="fast") fits: one coarse step that serves as
        draft, then mixed ones of which the first alone computes the whole sequence.
    mask_image: white where the edit is (PIL, array [H, W] or [B, H, W], or tensor); it replaces the draft. A token with
        any white pixel is edited.
    num_inference_steps: None takes the steps of the config; a number scales its stages to that many. `sigmas` are
        shifted for as many steps as they are; the stock pipeline takes num_inference_steps there.
    max_area: pixels that references, and so the output, are brought down to; 1024 * 1024 if None.
    image: a PIL picture or a list of them, seen by every prompt. The first is the one that is edited: the draft is
        compared with it, what does not change is taken from it, and its condition tokens are coarse outside the edit.
        The others are seen whole: fine in mixed steps (`coarse_references=True`: coarse), at the stage's resolution in
        coarse and draft steps.
    height, width: rounded down to multiples of 32 pixels (whole 2x2 blocks of tokens; the stock pipeline has 16). Where
        both are left out the first picture's, which is cropped to that (stretched, with output_size="source"). Where
        given, and not the first picture's own,
        the model sees it at its own size, all of it fine in mixed steps, and a copy at the output's size is what a
        draft is compared with and what stays outside the edit.
    latents: white noise, packed in channels, [B, 4C, rows, columns].
    guidance_scale: true guidance against an empty text with the base weights, as in the stock pipeline; both branches
        share one draft, one mask and one layout. Without effect with distilled weights.
    callback_on_step_end: `latents` holds the packed tokens of the step at hand: coarse grid, mixed sequence
        (target, then condition slots), or fine grid.

    With no image given, or `specedit=False`, the stock call runs.
    """

    TRUE_CFG = "guidance_scale"
    NEGATIVE = ""

    def _latents(self, model: EditModel, clean: Tensor) -> Tensor:
        """The autoencoder's own latents [B, C, H, W], as the stock pipeline gives them."""
        return model.codec.unscaled(clean)

    def _guidance(self, call: Call, device: torch.device, batch: int) -> None:
        return None

    def _guides(self, call: Call) -> bool:
        if self.config.is_distilled:
            call.true_cfg_scale = 1.0
        return super()._guides(call)


class SpecEditFlux2Pipeline(_SpecEditFlux2Mixin, Flux2Pipeline):
    """Flux2Pipeline (FLUX.2-dev) with SpecEdit; the call is SpecEditFlux2KleinPipeline's but for:

    guidance_scale: distilled into the model, as in the stock pipeline; there is no second branch.
    output_type: "latent" gives packed tokens [B, N, 4C] as the model has them, as in the stock pipeline; klein's gives
        the autoencoder's own latents [B, C, H, W].
    caption_upsample_temperature: the text encoder writes a longer prompt first, as in the stock pipeline.
    """

    TRUE_CFG = ""

    def _texts(self, call: Call, device: torch.device) -> dict[str, Any]:
        if call.caption_upsample_temperature:
            pictures = call.image if isinstance(call.image, list) else [call.image]
            call.prompt = self.upsample_prompt(
                call.prompt, images=pictures, temperature=call.caption_upsample_temperature, device=device
            )
        return super()._texts(call, device)


def _command(settings: Mapping[str, Any], true_cfg_scale: float | None) -> dict[str, Any]:
    """Options of the command's calls: a folder's area in pixels; the guidance asked for, else the pipeline's."""
    options: dict[str, Any] = {} if true_cfg_scale is None else {"guidance_scale": true_cfg_scale}
    if "resolution" in settings:
        options["max_area"] = settings["resolution"] ** 2
    return options


register(
    Model(
        name="flux2",
        pipelines={Flux2KleinPipeline: SpecEditFlux2KleinPipeline, Flux2Pipeline: SpecEditFlux2Pipeline},
        processors={
            Flux2AttnProcessor: SpecEditFluxAttnProcessor,
            Flux2ParallelSelfAttnProcessor: SpecEditFlux2SingleAttnProcessor,
        },
        codecs={AutoencoderKLFlux2: Flux2Codec},
        replaced={Flux2Transformer2DModel: replaced},
        command=_command,
        several_pictures=("Flux2KleinPipeline", "Flux2Pipeline"),
    )
)
