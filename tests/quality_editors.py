# SPDX-License-Identifier: Apache-2.0
"""What the tests of bench/quality's tiny editors share, a family and its classes given: folders, batches, training."""

import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench" / "quality"))

import export
import table_runs as runs
import text
import train_editor

PHRASES = ["remove the cat", f"put {text.article(text.NAMES[3])} in the bottom left", ""]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def fixtures(family, stock, latents):
    """(folder: the family's editor in its real size with random weights, exported; pipe: it loaded as any user would,
    by `stock`, no code of ours), fixtures of a module. latents: those that the autoencoder's scale is of, their shape.
    """

    @pytest.fixture(scope="module")
    def folder(tmp_path_factory):
        torch.manual_seed(0)
        weights = {name: make().state_dict() for name, (_, make) in family.parts.items()}
        path, vae = tmp_path_factory.mktemp("family") / "editor", family.make_vae()
        family.set_scale(vae, torch.randn(latents, generator=seeded()) * 2 + 1)
        # `export` itself refuses what takes too much room
        assert export.export(family, vae, weights, path) == export.folder_size(path) < export.LIMIT
        return path

    @pytest.fixture(scope="module")
    def pipe(folder):
        return quiet(stock.from_pretrained(folder))

    return folder, pipe


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def two_edits(size=64, kind="local"):
    """Of the evaluation's, held against their targets."""
    found = runs.make_set(torch.device("cpu"), size, counts={kind: 2}, seed=5)
    found.reference = found.tokens
    return found


def batch(encoder, side=8):
    """source, target, weights and ids of two phrases, as training has them."""
    ids = torch.tensor([encoder(phrase)[0] for phrase in PHRASES[:2]])
    source, target = torch.randn(2, 2, 16, side, side, generator=seeded())
    return source, target, torch.full((2, side * side // 4), 4.0), ids


def learnt(family, encoder, length, steps):
    """Names of the weights that train on one batch, which has to be learnt."""
    torch.manual_seed(0)
    editor = train_editor.Editor(family)
    optimizer = torch.optim.AdamW(editor.parameters(), lr=3e-3)
    fields, sigma, noise = batch(encoder), torch.tensor([0.5, 0.8]), torch.randn(2, 16, 8, 8, generator=seeded(5))
    losses = []
    for _ in range(steps):
        loss, apart = editor.loss(fields, length, sigma, noise, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert apart.shape == (2,) and losses[-1] < 0.5 * losses[0]
    return {name for name, p in editor.named_parameters() if optimizer.state.get(p)}


def trained(name, family, kind, shares, option, values, folder, monkeypatch, capsys):
    """A pipeline of `kind` from what the training script leaves, run once for each value of an option; after the first
    it has to go on. shares: of each size's kinds of edits."""
    monkeypatch.setattr(train_editor, "RUN_DIR", folder)
    monkeypatch.setattr(train_editor, "SIZES", (64, 48, 32))
    monkeypatch.setattr(family, "shares", dict.fromkeys((64, 48, 32), shares))
    monkeypatch.setitem(train_editor.FAMILIES, name, family)
    family.make_vae().save_pretrained(folder / "vae")
    options = f"--family {name} --tokens 100 --workers 0 --compile none --capacity 8 8 8 {option}".split()
    for value in values:
        monkeypatch.setattr(sys, "argv", ["train_editor.py", *options, value])
        train_editor.main()
    assert "resumed at step 1" in capsys.readouterr().out
    return kind.from_pretrained(folder / "editor")


def longest_phrase():
    every = (text.phrase(task, v, "a", "apple", "red", "top left") for task, t in text.TEMPLATES.items()
             for v in range(len(t)))  # fmt: skip
    return max(every, key=lambda phrase: len(phrase.split())).replace("apple", text.NAMES[0])


def a_corner_is_edited(pipe, steps, **options):
    """A call by a mask: beyond it every pixel is the source's."""
    source = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))
    mask = np.zeros((64, 96), np.float32)
    mask[:32, :32] = 1
    out = pipe(image=source, prompt="make the cat blue", mask_image=mask, generator=seeded(), **options)
    assert out.images[0].size == (96, 64) and out.stats.nfe == steps
    assert (np.asarray(out.images[0])[:, 32:] == np.asarray(source)[:, 32:]).all()
