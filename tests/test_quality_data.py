# SPDX-License-Identifier: Apache-2.0
"""The generator of edits, its tokenizers and the judge's geometry, without any trained weight."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

QUALITY = Path(__file__).parents[1] / "bench" / "quality"


@pytest.fixture(scope="module", autouse=True)
def quality_on_path():
    sys.path.insert(0, str(QUALITY))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    sys.path.remove(str(QUALITY))


@pytest.fixture(scope="module")
def scenes(quality_on_path):
    return importlib.import_module("scenes")


@pytest.fixture(scope="module")
def renderer(scenes):
    return scenes.Renderer("cpu")


@pytest.mark.parametrize("path", sorted(QUALITY.glob("*.py")), ids=lambda path: path.stem)
def test_public_names_alone_are_imported(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\bspecedit_kernels(\.\w+)*\.(engine\b|_(?!_))", text), "expected public names alone"
    assert "sys.path" not in text


def draw(scenes, n, seed=0, **kwargs):
    return scenes.sample(n, torch.Generator().manual_seed(seed), **kwargs)


def of_task(scenes, task, n, **kwargs):
    return draw(scenes, n, tasks=torch.full((n,), scenes.TASKS.index(task)), **kwargs)


@pytest.mark.slow
def test_same_seed_same_edits(scenes, renderer):
    first, second, other = (draw(scenes, 6, seed) for seed in (3, 3, 4))
    assert first.phrases() == second.phrases() != other.phrases()
    one, two = renderer(first, 128), renderer(second, 128)
    assert torch.equal(one.source, two.source) and torch.equal(one.target, two.target)


@pytest.mark.parametrize("held_out", [False, True])
def test_pairings_are_held_out(scenes, held_out):
    edits = draw(scenes, 2000, held_out=held_out)
    subject, new, color = edits.subject, edits.new, edits.color
    replaced = (subject >= 0) & (new >= 0)
    recolored = color >= 0
    assert replaced.sum() > 200 and recolored.sum() > 100
    assert (((new - subject) % 10 == 0)[replaced] == held_out).all()
    assert (((subject % len(scenes.COLORS)) == color)[recolored] == held_out).all()
    added = (subject < 0) & (new >= 0)
    assert (((new - edits.object[:, 0]) % 10 == 0)[added] == held_out).all()


def test_photographs_are_held_out(scenes):
    train, held = (set(scenes.photo_files(flag)) for flag in (False, True))
    stems = [{name.rstrip("0123456789.jpg") for name in names} for names in (train, held)]
    assert not stems[0] & stems[1]
    assert len(stems[1]) >= 6
    assert all((scenes.DATA / "photos" / name).exists() for name in train | held)


def test_objects_of_a_scene_are_distinct(scenes):
    edits = draw(scenes, 2000)
    for row, new in zip(edits.object.tolist(), edits.new.tolist()):
        shown = [i for i in row if i >= 0] + ([new] if new >= 0 else [])
        assert len(shown) == len(set(shown))


@pytest.mark.parametrize("task", ["replace", "remove", "recolor", "add", "add_open"])
def test_outside_the_mask_nothing_changes(scenes, renderer, task):
    rendered = renderer(of_task(scenes, task, 6), 128)
    difference = (rendered.source - rendered.target).abs().amax(1)
    assert rendered.mask.any() and not rendered.mask.all()
    assert difference[~rendered.mask].max() <= scenes.CHANGED
    far = torch.nn.functional.max_pool2d(rendered.mask[:, None].float(), 9, 1, 4)[:, 0] == 0
    assert difference[far].max() == 0
    assert 0.0 < rendered.tokens.float().mean() < 0.5


def test_global_edits_change_nearly_everything(scenes, renderer):
    for task in scenes.GLOBALS:
        assert renderer(of_task(scenes, task, 4), 128).tokens.float().mean() > 0.9, task


def test_removed_object_leaves_the_background(scenes, renderer):
    edits = of_task(scenes, "remove", 4)
    without = edits[torch.arange(4)]
    without.object[:, 0] = -1
    assert torch.equal(renderer(edits, 128).target, renderer(without, 128).source)


@pytest.mark.parametrize("task", ["replace", "add", "add_open", "snow"])
def test_weights_do_not_depend_on_the_random_target(scenes, renderer, task):
    edits = of_task(scenes, task, 4)
    other = edits[torch.arange(4)]
    other.after_pose[:, 2:] = other.after_pose[:, 2:] * 0.8
    other.after_flip[:] = ~other.after_flip
    other.snow[:, 1:] *= -1
    first, second = renderer(edits, 128), renderer(other, 128)
    assert not torch.equal(first.target, second.target)
    assert torch.equal(first.weight, second.weight)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["replace", "add"])
def test_weights_cover_every_new_object(scenes, renderer, task):
    rendered = renderer(of_task(scenes, task, 24), 256)
    covered = (rendered.weight > 1)[rendered.tokens].float().mean()
    assert covered > 0.97


def test_sizes_show_the_same_scene(scenes, renderer):
    edits = draw(scenes, 4)
    large, small = renderer(edits, 256), renderer(edits, 128)
    reduced = torch.nn.functional.avg_pool2d(large.source, 2)
    assert (reduced - small.source).square().mean().sqrt() < 0.06


@pytest.mark.slow
def test_evaluation_set_is_fixed_and_counted(scenes):
    counts = {"local": 8, "small": 4, "ambiguous": 2, "global": 5}
    first, second = scenes.evaluation_set(counts), scenes.evaluation_set(counts)
    assert first.phrases() == second.phrases()
    assert [int((first.kind == k).sum()) for k in range(4)] == [8, 4, 2, 5]
    assert first.unique().tolist() == [scenes.TASKS[t] in scenes.UNIQUE for t in first.task.tolist()]
    with pytest.raises(ValueError, match="counts"):
        scenes.evaluation_set({"locale": 3})


def test_every_phrase_is_whole_words_for_both_tokenizers(scenes):
    text = importlib.import_module("text")
    encoder = text.PhraseEncoder()
    clip, t5 = text.clip_tokenizer(), text.t5_tokenizer()
    assert clip.eos_token_id == len(clip) - 1 != 2
    phrases = draw(scenes, 200).phrases()
    for i, plain in enumerate(phrases):
        capital, stop = bool(i & 1), bool(i & 2)
        written = (plain.capitalize() if capital else plain) + ("." if stop else "")
        clip_ids, t5_ids = encoder(plain, capital, stop)
        assert clip_ids == clip(written, padding="max_length", max_length=77).input_ids
        assert t5_ids == t5(written, padding="max_length", max_length=text.PHRASE_LENGTH).input_ids
        assert t5.unk_token_id not in t5_ids
        assert len(plain.split()) + 2 <= text.PHRASE_LENGTH


def test_captions_tell_what_stands_where(scenes):
    text = importlib.import_module("text")
    encoder, clip, t5 = text.CaptionEncoder(), text.clip_tokenizer(), text.t5_tokenizer()
    for task, change in (("replace", 0), ("remove", -1), ("recolor", 0), ("add", 1)):
        edits = of_task(scenes, task, 60)
        for i, (before, after) in enumerate(edits.captions()):
            assert before.count(" with ") == (edits.object[i] >= 0).sum() and before != after
            assert after.count(" with ") - before.count(" with ") == change
            if task == "recolor":
                name, color = text.NAMES[edits.subject[i]], text.COLORS[edits.color[i]]
                assert f"{color} {name}" in after and f"{color} {name}" not in before
            if task == "add":
                added = f"with {text.article(text.NAMES[edits.new[i]])} in the {text.PLACES[edits.place[i]]}"
                assert after.replace(f" {added}", "") == before
            clip_ids, t5_ids = encoder(after, True, True)
            written = after.capitalize() + "."
            assert clip_ids == clip(written, padding="max_length", max_length=77).input_ids
            assert t5_ids == t5(written, padding="max_length", max_length=text.CAPTION_LENGTH).input_ids
            assert t5.unk_token_id not in t5_ids
    backgrounds = [before.split(" with ")[0] for before, _ in draw(scenes, 300).captions()]
    assert {"a picture", *(f"a {color} scene" for color in text.COLORS)} == set(backgrounds)


@pytest.mark.slow
def test_a_model_of_captions_learns_both_pictures_of_an_edit_and_sees_neither(scenes):
    families, text = importlib.import_module("families"), importlib.import_module("text")
    training, stream = importlib.import_module("train_editor"), importlib.import_module("stream")
    family, encoder, dev = families.TextFlux, text.CaptionEncoder(), torch.device("cpu")
    torch.manual_seed(0)
    source = stream.EditStream(1, 4, 0, training.CAPTIONED, encoder=text.CaptionEncoder)
    captions, take = [], source.take

    def recorded(count):
        edits, ids = take(count)
        captions.extend(edits.captions())
        return edits, ids

    source.take = recorded
    feeder = training.Feeder(family.make_vae().eval(), source, dev, (1, 1, 6), 0.5, family)
    rows = feeder.render(128, 5)  # one edit too many for so many rows
    pictures, same, weight, ids = feeder.rings[128].get(rows)
    assert len(rows) == 4 and torch.equal(pictures, same) and (weight == 1).all()
    assert not torch.equal(pictures[:2], pictures[2:])
    in_order = [pair[0] for pair in captions] + [pair[1] for pair in captions]
    styles = [(capital, stop) for capital in (False, True) for stop in (False, True)]
    written = [[[i for part in encoder(caption, *style) for i in part] for style in styles] for caption in in_order]
    assert all(row in known for row, known in zip(ids.tolist(), written, strict=True))
    assert ids.shape[1] == family.ids_width
    assert len(feeder.batch(128, 4)[0]) == 4 and feeder.rings[128].filled == 6  # the ring has come round
    editor = training.Editor(family)
    editor.family = type("Told", (family,), {"empty_share": 0.0})
    sigma, noise = torch.full((4,), 0.5), torch.randn_like(pictures)
    with torch.no_grad():
        told, other = (
            editor.loss((x, pictures, weight, ids), text.CAPTION_LENGTH, sigma, noise, sigma * 7)[0]
            for x in (pictures, torch.randn_like(pictures))
        )
        untold = editor.loss((pictures, pictures, weight, ids.flip(0)), text.CAPTION_LENGTH, sigma, noise, sigma * 7)[0]
    assert told == other and told != untold


def test_tokenizers_survive_saving(tmp_path):
    from transformers import CLIPTokenizer, T5TokenizerFast

    text = importlib.import_module("text")
    line = "Replace the cat with an octopus, or a zebra."
    for made, kind in ((text.clip_tokenizer(), CLIPTokenizer), (text.t5_tokenizer(), T5TokenizerFast)):
        made.save_pretrained(tmp_path / kind.__name__)
        assert kind.from_pretrained(tmp_path / kind.__name__)(line).input_ids == made(line).input_ids


def test_found_box_is_where_the_object_is(scenes):
    judge = importlib.import_module("judge")
    source = torch.zeros(2, 3, 256, 256)
    output = source.clone()
    output[0, :, 64:128, 160:224] = 1.0  # rows 64 to 127, columns 160 to 223
    output[0, :, 8:16, 8:16] = 1.0  # a smaller change elsewhere
    boxes, found = judge.found_boxes(source, output)
    assert found.tolist() == [True, False]
    assert boxes[0].tolist() == pytest.approx([0.75, 0.375, 0.25 * judge.MARGIN], abs=0.02)


def test_cut_shows_the_box():
    judge = importlib.import_module("judge")
    image = torch.zeros(1, 3, 512, 512)
    image[:, 0, 128:256, 256:384] = 1.0
    crop = judge.cut(image, torch.tensor([[0.625, 0.375, 0.25]]))
    assert crop.shape == (1, 3, judge.CROP, judge.CROP)
    assert crop[:, 0].mean() > 0.98 and crop[:, 1:].max() == 0


@pytest.mark.slow
def test_global_edits_are_told_apart(scenes, renderer):
    judge = importlib.import_module("judge")
    untrained = judge.Judge().eval()
    edits = scenes.Edits.cat([of_task(scenes, task, 4, held_out=True) for task in scenes.GLOBALS])
    rendered = renderer(edits, 128, held_out=True)
    assert judge.judge_edits(untrained, edits, rendered.source, rendered.target).all()
    assert not judge.judge_edits(untrained, edits, rendered.source, rendered.source).any()


@pytest.mark.slow
@pytest.mark.parametrize("task", ("remove", "recolor"))
def test_the_one_right_answer_is_told_from_the_others(scenes, renderer, task):
    judge = importlib.import_module("judge")
    edits = of_task(scenes, task, 2, held_out=True)
    rendered = renderer(edits, 128, held_out=True)
    assert judge.nearest_is_asked(edits, rendered.target, held_out=True).all()
    assert not judge.nearest_is_asked(edits, rendered.source, held_out=True).any()
    drawn, k = judge.answers(edits)
    other = drawn[torch.arange(len(edits)) * k + k - 1 - edits.subject % 2]  # another object in the same pose
    wrong = renderer(other, 128, held_out=True).target
    assert not judge.nearest_is_asked(edits, wrong, held_out=True).any()
    # Through blur a right answer stays right.
    blurred = torch.nn.functional.avg_pool2d(rendered.target, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert judge.nearest_is_asked(edits, blurred, held_out=True).all()


def test_muon_orthogonalises():
    muon = importlib.import_module("muon")
    g = torch.Generator().manual_seed(0)
    for shape in ((3, 24, 40), (2, 40, 24)):
        values = torch.linalg.svdvals(muon.orthogonalise(torch.randn(shape, generator=g)).float())
        assert values.min() > 0.5 and values.max() < 1.3
    with pytest.raises(ValueError, match="matrices"):
        muon.Muon([torch.nn.Parameter(torch.zeros(3))])


def test_packing_is_the_pipelines():
    from diffusers import FluxKontextPipeline

    sampler = importlib.import_module("sampler")
    z = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    packed = sampler.pack(z)
    assert torch.equal(packed, FluxKontextPipeline._pack_latents(z, 2, 16, 8, 12))
    assert torch.equal(sampler.unpack(packed, (4, 6)), z)
    ids = FluxKontextPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32)
    assert torch.equal(importlib.import_module("families").image_ids(4, 6, 0, "cpu"), ids)
