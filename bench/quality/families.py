# SPDX-License-Identifier: Apache-2.0
"""What differs between the tiny models: the classes, latents, text and calls of FLUX.1-Kontext, Qwen-Image-Edit and
FLUX.2-klein, editors, and of FLUX.1, which makes pictures from captions.

A family is a class that is never instantiated. parts: name of a set of weights -> (the pipeline's component that holds
it, function that makes it). A text is (states [n, T, d], and FLUX's pooled CLIP [n, d], Qwen's mask [n, T] or None).
"""

import json
from functools import lru_cache
from pathlib import Path

import models
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    Flux2KleinPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    QwenImageEditPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from text import (
    CAPTION_LENGTH,
    CLIP_LENGTH,
    KLEIN_LENGTH,
    PHRASE_LENGTH,
    QWEN_LENGTH,
    CaptionEncoder,
    KleinPhraseEncoder,
    PhraseEncoder,
    QwenPhraseEncoder,
    clip_tokenizer,
    klein_tokenizer,
    qwen_tokenizer,
    t5_tokenizer,
)

from specedit_kernels.models.flux2 import PICTURE_STEP, Flux2Model
from specedit_kernels.models.flux_kontext import FluxKontextModel
from specedit_kernels.models.qwen_image_edit import QwenImageEditModel


def image_ids(rows, columns, index, device):
    """[rows * columns, 3]: (index, row, column); index 0 is the target, 1 the condition."""
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 0] = index
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)[None]
    return ids.view(-1, 3)


def _rewrite(path, change):
    """A JSON file after `change` has been at its content."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=2) + "\n")


class Flux:
    pipeline, vae = FluxKontextPipeline, AutoencoderKL
    thresholds = FluxKontextModel.thresholds
    encoder = PhraseEncoder
    parts = {
        "transformer": ("transformer", models.make_transformer),
        "clip": ("text_encoder", models.make_clip),
        "t5": ("text_encoder_2", models.make_t5),
    }
    make_vae, make_scheduler = staticmethod(models.make_vae), staticmethod(models.make_scheduler)
    shift = None  # the scheduler's own
    arguments = {}  # of the pipeline beside its components
    settings = {"resolution": 512, "max_sequence_length": 64}  # of specedit.json
    sees_source = True  # the source's tokens stand after the target's
    mix = {"early": (0.0, 0.72, 0.28), "late": (0.58, 0.22, 0.20)}  # shares of 512, 256 and 128 px in training
    phrase_length = PHRASE_LENGTH
    ids_width = CLIP_LENGTH + PHRASE_LENGTH  # of one picture's text
    empty_share = 0.0  # of prompts without words in training
    default_length = 512  # of a padded prompt in the measurements: the pipeline's default
    # Padded lengths of T5's prompt. Users' pipelines pad to 512 by default; nothing masks the padding.
    lengths = (16, 32, 64, 128, 256, 512)
    shares = {
        512: (0.26, 0.14, 0.10, 0.10, 0.12, 0.28),
        256: (0.40, 0.20, 0.12, 0.10, 0.08, 0.10),
        128: (0.40, 0.20, 0.12, 0.12, 0.08, 0.08),
    }
    # Where each shape is compiled by itself: two lengths, the command's and the pipelines' default.
    static_lengths = (64, 512)
    static_shares = {512: (0.7, 0.3), 256: (0.75, 0.25), 128: (0.75, 0.25)}

    @staticmethod
    def posterior(vae, x):
        """Distribution of the latents, not normalised, of pictures [n, 3, H, W] in [-1, 1]."""
        return vae.encode(x).latent_dist

    @staticmethod
    def decode(vae, z):
        """Pictures from latents that are not normalised; not clamped."""
        return vae.decode(z).sample

    @staticmethod
    def set_scale(vae, z):
        """From latents z: scales each channel to unit deviation inside the weights, one scale and shift for all."""
        deviation = z.std(dim=(0, 2, 3))
        channels = len(deviation)
        head, stem = vae.encoder.conv_out, vae.decoder.conv_in
        head.weight[:channels] /= deviation.view(-1, 1, 1, 1)
        head.bias[:channels] /= deviation
        head.bias[channels:] -= 2 * deviation.log()  # the log-variances that stand beside the means
        stem.weight *= deviation.view(1, -1, 1, 1)
        z = z / deviation.view(1, -1, 1, 1)
        vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4), shift_factor=round(z.mean().item(), 4))

    @classmethod
    def text(cls, parts, ids, length):
        """A text from the encoder's ids."""
        clip, t5 = ids.split((CLIP_LENGTH, cls.phrase_length), dim=1)
        t5 = F.pad(t5, (0, length - cls.phrase_length)) if length > cls.phrase_length else t5[:, :length]
        return parts["t5"](t5)[0], parts["clip"](clip).pooler_output

    @staticmethod
    def encode_text(pipe, phrases, length, device):
        """A text from phrases, by the pipeline's own encoders."""
        t5 = pipe.tokenizer_2(phrases, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        clip = pipe.tokenizer(phrases, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        return (
            pipe.text_encoder_2(t5.input_ids.to(device))[0],
            pipe.text_encoder(clip.input_ids.to(device)).pooler_output,
        )

    @staticmethod
    def velocity(transformer, tokens, condition, sigma, grid, text, guidance):
        """Of packed target tokens, with the source's after them, or None; grid: both's (rows, columns); sigma,
        guidance [n]."""
        states, pooled = text
        shown = [tokens] if condition is None else [tokens, condition]
        ids = torch.cat([image_ids(*grid, index, tokens.device) for index in range(len(shown))])
        return transformer(
            hidden_states=torch.cat(shown, 1),
            timestep=sigma,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=torch.zeros(states.shape[1], 3, device=tokens.device),
            img_ids=ids,
            return_dict=False,
        )[0][:, : tokens.shape[1]]

    @staticmethod
    def tokenizers():
        """The pipeline's components without weights."""
        return {"tokenizer": clip_tokenizer(), "tokenizer_2": t5_tokenizer()}

    @staticmethod
    def finish(folder):
        """Older transformers know the fast class by this name only, and want CLIP's two files."""
        _rewrite(folder / "model_index.json", lambda x: x.update(tokenizer_2=["transformers", "T5TokenizerFast"]))
        model = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
        (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]) + "\n")
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


class TextFlux(Flux):
    """FLUX.1, a model of the same transformer that sees a caption and no source."""

    pipeline, encoder = FluxPipeline, CaptionEncoder
    settings = {"resolution": 256, "max_sequence_length": CAPTION_LENGTH}
    sees_source = False
    mix = {"early": (0.0, 0.70, 0.30), "late": (0.0, 0.85, 0.15)}
    phrase_length = CAPTION_LENGTH
    ids_width = CLIP_LENGTH + CAPTION_LENGTH
    empty_share = 0.1  # so that guidance has something to lead away from
    default_length = CAPTION_LENGTH
    lengths = static_lengths = (CAPTION_LENGTH,)
    shares = static_shares = dict.fromkeys((512, 256, 128), (1.0,))

    @staticmethod
    def velocity(transformer, tokens, condition, sigma, grid, text, guidance):
        """condition: not looked at."""
        return Flux.velocity(transformer, tokens, None, sigma, grid, text, guidance)


@lru_cache(maxsize=2)
def _qwen_prefix(device):
    return torch.tensor(QwenPhraseEncoder().prefix, device=device)


class Qwen:
    """The tokenizer stands in for the pipeline's processor, which needs torchvision: the picture's place in the prompt
    keeps its one token, and the encoder sees no picture. The model sees it as condition tokens, as any Qwen does."""

    pipeline, vae = QwenImageEditPipeline, AutoencoderKLQwenImage
    thresholds = QwenImageEditModel.thresholds
    encoder = QwenPhraseEncoder
    parts = {
        "transformer": ("transformer", models.make_qwen_transformer),
        "text": ("text_encoder", models.make_qwen_text),
    }
    make_scheduler = staticmethod(models.make_qwen_scheduler)
    shift = None
    arguments = {}
    settings = {"resolution": 512, "true_cfg_scale": 1.0}
    sees_source, mix = True, Flux.mix
    ids_width = default_length = QWEN_LENGTH
    empty_share = 0.1  # then the source is to come back, so that guidance has something to lead away from
    # A mask hides the padding, and each prompt has its own length behind it.
    lengths = static_lengths = (QWEN_LENGTH,)
    shares = static_shares = dict.fromkeys((512, 256, 128), (1.0,))

    @staticmethod
    def make_vae():
        return models.as_pictures(models.make_qwen_vae())

    @staticmethod
    def posterior(vae, x):
        moments = vae.quant_conv(vae.encoder(x[:, :, None]))
        return DiagonalGaussianDistribution(moments[:, :, 0])

    @staticmethod
    def decode(vae, z):
        # the model's own decode clamps, and a clamped pixel has no gradient
        return vae.decoder(vae.post_quant_conv(z[:, :, None]))[:, :, 0]

    @staticmethod
    def set_scale(vae, z):
        """From latents z: each channel's mean and deviation."""
        mean, deviation = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))
        vae.register_to_config(
            latents_mean=[round(x, 4) for x in mean.tolist()], latents_std=[round(x, 4) for x in deviation.tolist()]
        )

    @staticmethod
    def text(parts, ids, length):
        encoder, prefix = parts["text"], _qwen_prefix(ids.device)
        whole = torch.cat([prefix.expand(len(ids), -1), ids], 1)
        # Padding comes last, and the encoder looks back alone: no mask is needed here.
        states = encoder.model.language_model(inputs_embeds=encoder.get_input_embeddings()(whole)).last_hidden_state
        return states[:, len(prefix) :], ids != qwen_tokenizer().pad_token_id

    @staticmethod
    def encode_text(pipe, phrases, length, device):
        return pipe.encode_prompt(phrases, device=device)

    @staticmethod
    def velocity(transformer, tokens, condition, sigma, grid, text, guidance):
        states, mask = text
        return transformer(
            hidden_states=torch.cat([tokens, condition], 1),
            timestep=sigma,
            encoder_hidden_states=states,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, *grid)] * 2] * len(tokens),
            return_dict=False,
        )[0][:, : tokens.shape[1]]

    @staticmethod
    def tokenizers():
        return {"tokenizer": qwen_tokenizer(), "processor": qwen_tokenizer()}

    @staticmethod
    def finish(folder):
        """The name that every version of transformers knows."""
        known = ["transformers", "PreTrainedTokenizerFast"]
        _rewrite(folder / "model_index.json", lambda x: x.update(tokenizer=known, processor=known))


class Klein:
    """Without guidance, also before it is distilled to few steps: the model sees its source and needs none."""

    pipeline, vae = Flux2KleinPipeline, AutoencoderKLFlux2
    thresholds = Flux2Model.thresholds
    encoder = KleinPhraseEncoder
    parts = {
        "transformer": ("transformer", models.make_klein_transformer),
        "text": ("text_encoder", models.make_klein_text),
    }
    make_vae, make_scheduler = staticmethod(models.make_klein_vae), staticmethod(models.make_klein_scheduler)
    arguments = {"is_distilled": True}
    settings = Flux.settings
    sees_source, mix = True, Flux.mix
    ids_width = KLEIN_LENGTH
    empty_share = 0.0
    default_length = 512
    # As FLUX's: the transformer sees the padding.
    lengths = (32, 64, 128, 256, 512)
    shares = {512: (0.26, 0.24, 0.10, 0.12, 0.28), 256: (0.4, 0.3, 0.12, 0.1, 0.08), 128: (0.4, 0.3, 0.14, 0.08, 0.08)}
    static_lengths, static_shares = Flux.static_lengths, Flux.static_shares
    posterior, decode = Flux.posterior, Flux.decode

    @staticmethod
    def shift(tokens, steps=None):
        """The pipeline's. For training, where there are no steps, 1.2: the pipeline's 1.7 to 2.0 would seldom draw the
        low noise levels, where detail is made."""
        return 1.2 if steps is None else compute_empirical_mu(tokens, steps)

    @staticmethod
    def set_scale(vae, z):
        """From latents z: the batch norm's statistics, of each channel of a packed token."""
        packed = F.pixel_unshuffle(z, 2)
        vae.bn.running_mean.copy_(packed.mean(dim=(0, 2, 3)))
        vae.bn.running_var.copy_(packed.var(dim=(0, 2, 3)))

    @staticmethod
    def text(parts, ids, length):
        pad = klein_tokenizer().pad_token_id
        ids = F.pad(ids, (0, length - KLEIN_LENGTH), value=pad) if length > KLEIN_LENGTH else ids[:, :length]
        found = parts["text"].model(
            input_ids=ids, attention_mask=(ids != pad).long(), output_hidden_states=True, use_cache=False
        )
        return torch.cat([found.hidden_states[layer] for layer in (9, 18, 27)], -1), None

    @staticmethod
    def encode_text(pipe, phrases, length, device):
        return pipe.encode_prompt(phrases, device=device, max_sequence_length=length)[0], None

    @staticmethod
    def velocity(transformer, tokens, condition, sigma, grid, text, guidance):
        states, _ = text
        ids = torch.cat([F.pad(image_ids(*grid, at, tokens.device), (0, 1)) for at in (0, PICTURE_STEP)])
        words = torch.zeros(states.shape[1], 4, device=tokens.device)
        words[:, 3] = torch.arange(states.shape[1], device=tokens.device)
        return transformer(
            hidden_states=torch.cat([tokens, condition], 1),
            timestep=sigma,
            encoder_hidden_states=states,
            txt_ids=words,
            img_ids=ids,
            return_dict=False,
        )[0][:, : tokens.shape[1]]

    @staticmethod
    def tokenizers():
        return {"tokenizer": klein_tokenizer()}

    @staticmethod
    def finish(folder):
        known = ["transformers", "PreTrainedTokenizerFast"]
        _rewrite(folder / "model_index.json", lambda x: x.update(tokenizer=known))


FAMILIES = {"flux": Flux, "qwen": Qwen, "klein": Klein, "text-flux": TextFlux}


def family_of(pipe):
    """The family of a pipeline."""
    return next(family for family in FAMILIES.values() if isinstance(pipe, family.pipeline))


def family_in(folder):
    """The family of a folder that holds a pipeline."""
    name = json.loads((Path(folder) / "model_index.json").read_text())["_class_name"]
    return next(family for family in FAMILIES.values() if family.pipeline.__name__ == name)


def editor_in(folder):
    """The family of a folder that holds an editor; ValueError where its model does not see its source."""
    family = family_in(folder)
    if not family.sees_source:
        raise ValueError(f"--model: expected an editor, got {folder}, whose model does not see its source")
    return family


def load_vae(family, folder):
    vae = family.vae.from_pretrained(folder)
    return models.as_pictures(vae)
