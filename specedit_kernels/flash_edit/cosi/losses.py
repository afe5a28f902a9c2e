# SPDX-License-Identifier: Apache-2.0
"""The losses of COSI. Latents are clean, scaled ones, [B, C, H, W]; losses are fp32 means over all but noted weights.

The paper (FlashEdit, arXiv 2509.22244) gives the two stages' terms and neither lambda nor w(t); ours are `CosiWeights`
and `teacher_loss`'s. Its explicit cycle is not given either. Here it is:

    image -> noise -> image    z -> F(z) -> G(F(z)) against z, for real pictures, under the source branch's text
    noise -> image -> noise    e -> G(e) -> F(G(e)) against e

The second is stage 1's noise term, because stage 1's pictures are the generator's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...engine.model import EditModel, Pictures, Text
from ...sampling.grid import pack
from ..one_step import complete_noise, grid_of, predict_clean, predict_noise, velocity_of


@dataclass(frozen=True)
class CosiWeights:
    """Weights of the terms: reconstruction and noise of stage 1, cycle: reconstruction of real pictures, teacher:
    stage 2's regulariser."""

    reconstruction: float = 1.0
    noise: float = 0.1
    cycle: float = 1.0
    teacher: float = 0.1


def reconstruction_loss(clean: Tensor, rebuilt: Tensor, weight: Tensor | None = None) -> Tensor:
    """|z - z^|^2 (stage 1, first term). weight: [B, 1, H, W], relative weight of each latent pixel, or None."""
    error = (clean.float() - rebuilt.float()).square()
    if weight is None:
        return error.mean()
    return (error * weight).sum() / (weight.sum() * error.shape[1])


def noise_loss(noise: Tensor, predicted_noise: Tensor) -> Tensor:
    """|e - e_inv|^2 (stage 1, second term): noise that a picture was made from, and what the inversion tells of it."""
    return (noise.float() - predicted_noise.float()).square().mean()


def teacher_noise(state: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """A flow model's estimate of the noise in a state: e = x + (1 - t) v. sigma: fp32 scalar or [B, 1, 1, 1]."""
    return state.float() + (1 - sigma) * velocity.float()


def teacher_loss(noise: Tensor, teacher: Tensor, sigma: Tensor) -> Tensor:
    """Stage 2: E_t[w(t) |e_inv - sg(e_teacher)|^2] with w(t) = t^2. sigma: fp32 scalar or [B, 1, 1, 1].

    A teacher's noise is off by (1 - t) / t times its error in the picture; this weight bounds that for small t.
    """
    return (sigma**2 * (noise.float() - teacher.detach().float()).square()).mean()


def answer_loss(answer: Tensor, made: Tensor, weight: Tensor, softness: float = 0.1) -> Tensor:
    """Pseudo-Huber distance of tokens, sqrt(mean |answer - made|^2 + softness^2) - softness, weighted: fp32 scalar.

    weight: [B, 1, H, W]. Where several answers are likely, its minimum is near one of them, not at their mean, which is
    a blur.
    """
    error = pack(answer.float() - made.float()).square().mean(dim=2)
    weight = pack(weight.float()).mean(dim=2)
    return (((error + softness**2).sqrt() - softness) * weight).sum() / weight.sum()


def distil_loss(
    generator: EditModel, text: Text, noise: Tensor, answer: Tensor, references: Sequence[Tensor], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """(`answer_loss` of G(e), where answer is what many steps of the model make of the same noise and text; G(e)).

    A regression along the model's own trajectory: noise decides what the instruction leaves open, so that there is one
    right answer for each noise.
    """
    made = predict_clean(generator, text, noise, references)
    return answer_loss(answer, made, weight), made


def matching_loss(
    teacher: EditModel, second: EditModel, text: Text, made: Tensor, references: Sequence[Tensor], noise: Tensor,
    sigma: Tensor, weight: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Distribution matching (DMD, arXiv 2311.18828): (the generator's loss, the second model's).

    made: the generator's pictures [B, C, H, W]; sigmas: fp32 [B]; weight: [B, 1, H, W]. The second model learns
    these pictures by rectified flow, |v - (e - z)|^2. The first loss moves them to where the teacher finds them
    likelier than that model does: its gradient is (z_second - z_teacher) / mean |made - z_teacher|, of both models'
    clean picture of the noised ones. A blur is likely to the second model and unlikely to the first.
    """
    clean, at = made.detach(), sigma.view(-1, 1, 1, 1)
    state, pictures = _noised(clean, noise, sigma), _pictures(clean, references)
    velocity = velocity_of(second, text, state, sigma, references, pictures)
    with torch.no_grad():
        real, ours = (state - at * v.float() for v in (
            velocity_of(teacher, text, state, sigma, references, pictures), velocity))  # fmt: skip
        scale = ((clean - real).abs() * weight).sum(dim=(1, 2, 3)) / (weight.sum(dim=(1, 2, 3)) * clean.shape[1])
        aim = clean - (ours - real) / scale.clamp(min=1e-3).view(-1, 1, 1, 1)
    return 0.5 * reconstruction_loss(aim, made, weight), reconstruction_loss(noise - clean, velocity, weight)


def _noised(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    at = sigma.view(-1, 1, 1, 1)
    return ((1 - at) * clean + at * noise).to(clean.dtype)


def _pictures(target: Tensor, references: Sequence[Tensor]) -> Pictures:
    return Pictures(grid_of(target), tuple(grid_of(x) for x in references))


def inversion_loss(
    generator: EditModel,
    inverter: EditModel,
    source_text: Text,
    made: tuple[Text, Tensor, Tensor | None],
    source: Tensor,
    fresh: Tensor,
    weights: CosiWeights,
    teacher: tuple[EditModel, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Loss of the inversion network: {"loss", and each term by its name}.

    generator: frozen. source_text: the source branch's text, under which the inversion network sees every picture.
    made: (text, noise, the generator's condition) of pictures that are made here, G(noise) [B, C, H, W]. No condition:
    the model does not see its source, and text is source_text.
    source: real pictures; fresh: white noise, [2 B, C, H, W], which completes what a picture tells of its noise.
    teacher: stage 2: (the multi-step model, frozen, and a sigma, 0-dim in (0, 1)); None: stage 1.
    """
    text, noise, condition = made
    made_from, seen = ([], []) if condition is None else ([condition], [source])
    with torch.no_grad():
        picture = predict_clean(generator, text, noise, made_from)
    first, second = fresh.chunk(2)
    predicted_noise = predict_noise(inverter, source_text, picture)
    rebuilt = predict_clean(generator, text, complete_noise(predicted_noise, first), made_from)
    inverted = complete_noise(predict_noise(inverter, source_text, source), second)
    cycled = predict_clean(generator, source_text, inverted, seen)
    terms = {
        "reconstruction": reconstruction_loss(picture, rebuilt),
        "noise": noise_loss(noise, predicted_noise),
        "cycle": reconstruction_loss(source, cycled),
    }
    if teacher is not None:
        model, sigma = teacher
        state = _noised(source, inverted, sigma)
        with torch.no_grad():
            velocity = velocity_of(model, source_text, state, sigma, seen, _pictures(source, seen))
        terms["teacher"] = teacher_loss(inverted, teacher_noise(state, velocity, sigma), sigma)
    return {"loss": sum(getattr(weights, name) * term for name, term in terms.items()), **terms}
