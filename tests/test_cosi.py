# SPDX-License-Identifier: Apache-2.0
"""COSI: its losses against their formulas, that training lowers them, and that a loop goes on where it stopped."""

import copy
import csv
import math

import pytest
import torch

pytest.importorskip("diffusers")

from tiny_models import qwen_text, tiny_pipeline, tiny_qwen

from specedit_kernels.flash_edit.cosi import (
    CosiWeights,
    Loop,
    answer_loss,
    distil_loss,
    inversion_loss,
    matching_loss,
    noise_loss,
    reconstruction_loss,
    teacher_loss,
    teacher_noise,
)
from specedit_kernels.flash_edit.cosi.low_rank import (
    add_low_rank,
    low_rank_state,
    merged_copy,
    save_low_rank,
)
from specedit_kernels.flash_edit.one_step import complete_noise, predict_clean, predict_noise
from specedit_kernels.models.flux_kontext import FluxKontextModel, FluxText
from specedit_kernels.models.qwen_image_edit import QwenImageEditModel, QwenText

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (2, 16, 8, 8)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def flux(pipe, transformer=None):
    return FluxKontextModel(transformer or pipe.transformer, pipe.vae, torch.full((2,), 3.5), {})


def flux_text(seed=0):
    return FluxText(normal(2, 6, 32, seed=seed), normal(2, 16, seed=seed + 1), torch.zeros(6, 3))


# losses


def test_losses_are_their_formulas():
    a, b = normal(*SHAPE), normal(*SHAPE, seed=1)
    expected = sum((x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist())) / a.numel()
    for loss in (reconstruction_loss, noise_loss):
        assert math.isclose(loss(a, b), expected, rel_tol=1e-5) and loss(a, a) == 0
    weight = torch.zeros(2, 1, 8, 8)
    weight[:, :, :4] = 2.0
    torch.testing.assert_close(reconstruction_loss(a, b, weight), reconstruction_loss(a[:, :, :4], b[:, :, :4]))


def test_a_teacher_that_knows_the_picture_tells_the_noise():
    clean, noise = normal(*SHAPE), normal(*SHAPE, seed=1)
    for sigma in (0.1, 0.7):
        at = torch.tensor(sigma)
        state = (1 - at) * clean + at * noise
        torch.testing.assert_close(teacher_noise(state, noise - clean, at), noise)
        # off by an error of the picture: w(t) = t^2 makes (1 - t)^2 of its square
        wrong = clean + 0.5
        predicted_noise = teacher_noise(state, (state - wrong) / at, at)
        assert math.isclose(teacher_loss(noise, predicted_noise, at), (1 - sigma) ** 2 * 0.25, rel_tol=1e-4)
    predicted_noise = noise.clone().requires_grad_()
    teacher_loss(noise.requires_grad_(), predicted_noise, torch.tensor(0.5)).backward()
    assert predicted_noise.grad is None and noise.grad is not None


def test_completed_noise_has_unit_variance():
    white = normal(2, 16, 64, 64)
    predicted_noise = torch.cat([normal(1, 16, 64, 64, seed=1) * 0.6, torch.zeros(1, 16, 64, 64)])
    out = complete_noise(predicted_noise, white)
    assert torch.allclose(out.square().mean(dim=(1, 2, 3)), torch.ones(2), atol=0.02)
    torch.testing.assert_close(out[1], white[1])
    predicted_noise = torch.full((1, 16, 4, 4), 2.0, requires_grad=True)  # tells more than all
    complete_noise(predicted_noise, normal(1, 16, 4, 4)).sum().backward()
    assert predicted_noise.grad.isfinite().all()


def test_generation_and_inversion_are_one_step_of_the_model(pipe):
    model, text = flux(pipe), flux_text()
    noise, source = normal(*SHAPE), normal(*SHAPE, seed=1)
    calls = []
    velocity = model.velocity
    model.velocity = lambda text, tokens, t, layout: (
        calls.append((float(t), tokens.shape[1])) or velocity(text, tokens, t, layout)
    )
    with torch.no_grad():
        clean, predicted_noise = predict_clean(model, text, noise, [source]), predict_noise(model, text, source)
    assert calls == [(1000.0, 32), (0.0, 16)] and clean.shape == predicted_noise.shape == noise.shape
    model.velocity = lambda text, tokens, t, layout: torch.ones_like(tokens)
    assert torch.equal(predict_clean(model, text, noise, [source]), noise - 1)
    assert torch.equal(predict_noise(model, text, source), source + 1)


def test_answer_loss_is_its_formula_and_prefers_one_of_two_answers_to_their_mean():
    a, b = normal(*SHAPE), normal(*SHAPE, seed=1)
    weight = torch.ones(2, 1, 8, 8)
    weight[:, :, :4] = 3.0
    error = (a - b).square().unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean(dim=(1, 3, 5)).flatten(1)  # [B, tokens]
    per_token = torch.tensor([3.0] * 8 + [1.0] * 8).expand(2, 16)
    expected = (((error + 0.04).sqrt() - 0.2) * per_token).sum() / per_token.sum()
    torch.testing.assert_close(answer_loss(a, b, weight, softness=0.2), expected)
    assert answer_loss(a, a, weight) == 0

    def of_both(made, loss):  # one answer twice as likely as the other
        return 2 * loss(a, made) + loss(b, made)

    mean = (2 * a + b) / 3
    assert of_both(a, lambda x, y: answer_loss(x, y, weight)) < of_both(mean, lambda x, y: answer_loss(x, y, weight))
    assert of_both(a, reconstruction_loss) > of_both(mean, reconstruction_loss)


def test_matching_moves_the_pictures_by_the_difference_of_the_two_models(pipe):
    made, noise = normal(*SHAPE).requires_grad_(), normal(*SHAPE, seed=1)
    source, sigma, weight = normal(*SHAPE, seed=2), torch.tensor([0.3, 0.8]), torch.ones(2, 1, 8, 8)
    weight[:, :, :4] = 3.0
    teacher, second = flux(pipe), flux(pipe)
    bias = torch.tensor(0.5, requires_grad=True)
    teacher.velocity = lambda text, tokens, t, layout: 0.2 * tokens
    second.velocity = lambda text, tokens, t, layout: 0.2 * tokens + bias
    loss, second_loss = matching_loss(teacher, second, flux_text(), made, [source], noise, sigma, weight)
    at, clean = sigma.view(2, 1, 1, 1), made.detach()
    state = (1 - at) * clean + at * noise
    real = state - at * 0.2 * state
    scale = ((clean - real).abs() * weight).sum(dim=(1, 2, 3)) / (weight.sum(dim=(1, 2, 3)) * 16)
    [slope] = torch.autograd.grad(loss, made, retain_graph=True)
    # z of the second model is 0.5 sigma below the teacher's
    expected = -0.5 * at / scale.view(2, 1, 1, 1) * weight / (weight.sum() * 16)
    torch.testing.assert_close(slope, expected.expand_as(slope))
    flow = ((noise - clean - 0.2 * state - 0.5).square() * weight).sum() / (weight.sum() * 16)
    torch.testing.assert_close(second_loss, flow)
    second_loss.backward()
    assert bias.grad is not None and made.grad is None


def terms_of(generator, inverter, text, teacher=None, sees_source=True):
    weights = CosiWeights(reconstruction=1.0, noise=2.0, cycle=3.0, teacher=4.0)
    made = (text, normal(*SHAPE, seed=3), normal(*SHAPE, seed=4) if sees_source else None)
    source, fresh = normal(*SHAPE, seed=5), normal(4, *SHAPE[1:], seed=6)
    return inversion_loss(generator, inverter, text, made, source, fresh, weights, teacher)


def test_inversion_loss_adds_its_terms_and_trains_the_inverter_alone(pipe):
    inverting = copy.deepcopy(pipe.transformer)
    trained = add_low_rank(inverting, 4)
    pipe.transformer.requires_grad_(False)
    models = flux(pipe), flux(pipe, inverting)
    first = terms_of(*models, flux_text())
    assert set(first) == {"loss", "reconstruction", "noise", "cycle"}
    second = terms_of(*models, flux_text(), (flux(pipe), torch.tensor(0.4)))
    sum_of = second["reconstruction"] + 2 * second["noise"] + 3 * second["cycle"] + 4 * second["teacher"]
    torch.testing.assert_close(second["loss"], sum_of)
    second["loss"].backward()
    assert all(p.grad is not None for p in trained)
    assert all(p.grad is None for p in pipe.transformer.parameters())


def test_without_a_condition_no_network_sees_the_source(pipe):
    found, generator = {}, flux(pipe)
    for sees_source in (True, False):
        counts, velocity = [], FluxKontextModel.velocity
        generator.velocity = lambda text, tokens, t, layout, counts=counts, velocity=velocity: (
            counts.append(tokens.shape[1]) or velocity(generator, text, tokens, t, layout)
        )
        with torch.no_grad():
            teacher = (generator, torch.tensor(0.4))
            terms = terms_of(generator, flux(pipe), flux_text(), teacher, sees_source)
        found[sees_source] = counts, terms
    assert found[True][0] == [32] * 4 and found[False][0] == [16] * 4
    assert all(found[True][1][name] != found[False][1][name] for name in ("reconstruction", "cycle", "teacher"))


def test_qwen_trains_too():
    pipe = tiny_qwen(zero_cond_t=True)
    inverting = copy.deepcopy(pipe.transformer)
    trained = add_low_rank(inverting, 4)
    given = qwen_text(6, batch=2)
    text = QwenText(given["prompt_embeds"], None)
    models = (QwenImageEditModel(x.requires_grad_(x is inverting), pipe.vae, None, {})
              for x in (pipe.transformer, inverting))  # fmt: skip
    terms_of(*models, text)["loss"].backward()
    # all but what the last block would do to the text
    assert sum(p.grad is not None and p.grad.isfinite().all() for p in trained) > 0.9 * len(trained)


# low-rank changes


def test_low_rank_changes_begin_at_nothing_and_merge_to_the_same(pipe, tmp_path):
    changed = copy.deepcopy(pipe.transformer)
    add_low_rank(changed, 4)
    text, noise, source = flux_text(), normal(*SHAPE), normal(*SHAPE, seed=1)
    with torch.no_grad():
        before = predict_clean(flux(pipe), text, noise, [source])
        assert torch.equal(predict_clean(flux(pipe, changed), text, noise, [source]), before)
        for x in low_rank_state(changed).values():
            x.copy_((normal(*x.shape, seed=x.shape[0]) * 0.05).bfloat16())
        after = predict_clean(flux(pipe, changed), text, noise, [source])
        save_low_rank(low_rank_state(changed), tmp_path / "x.safetensors")
        merged = merged_copy(pipe.transformer, tmp_path / "x.safetensors")
        assert not torch.allclose(after, before, atol=1e-3)
        torch.testing.assert_close(predict_clean(flux(pipe, merged), text, noise, [source]), after)


# the loop


def distilling(pipe, folder, steps, **options):
    """A loop that distils random answers which depend on the noise."""
    torch.manual_seed(7)
    module = copy.deepcopy(pipe.transformer)
    parameters = add_low_rank(module, 4)

    def loss(generator):
        noise, source = (torch.randn(SHAPE, generator=generator) for _ in range(2))
        answer = source * 0.5 + 0.1 * noise
        loss, _ = distil_loss(flux(pipe, module), flux_text(), noise, answer, [source], torch.ones(2, 1, 8, 8))
        return {"loss": loss}

    loop = Loop("generator", parameters, loss, folder, steps=steps, warmup=2, log_every=2, progress=False, **options)
    return loop, module


@pytest.mark.slow
def test_distilling_lowers_its_loss_and_logs_it(pipe, tmp_path):
    loop, _ = distilling(pipe, tmp_path, 60, rate=2e-2)
    loop.run()
    with open(tmp_path / "generator.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == list(range(2, 61, 2))
    assert sum(float(r["loss"]) for r in rows[-3:]) < 0.85 * sum(float(r["loss"]) for r in rows[:3])


@pytest.mark.slow
def test_a_resumed_loop_ends_with_the_same_weights(pipe, tmp_path):
    whole, module = distilling(pipe, tmp_path / "whole", 6)
    whole.run()
    first, _ = distilling(pipe, tmp_path / "parts", 6)
    calls, loss = [], first.loss

    def stop(generator):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return loss(generator)

    first.loss, first.save_every = stop, 0.0
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second, resumed = distilling(pipe, tmp_path / "parts", 6)
    assert second.step == 3
    second.run()
    for name, value in low_rank_state(module).items():
        assert torch.equal(value, low_rank_state(resumed)[name])
    again, _ = distilling(pipe, tmp_path / "parts", 6)
    again.run()
    assert again.step == 6


def test_a_loop_wants_one_budget(tmp_path):
    for budget in ({}, dict(steps=1, seconds=1.0)):
        with pytest.raises(ValueError, match="steps"):
            Loop("x", [torch.nn.Parameter(torch.zeros(1))], None, tmp_path, **budget)
