# SPDX-License-Identifier: Apache-2.0
"""What every model has to keep, on a pipeline and a call of it: used for each registered model, and for a model of a
test's own."""

import torch

from specedit_kernels.engine import stages
from specedit_kernels.sampling.grid import coarse_grid, pack


class Caught(Exception):
    pass


def run_of(pipe, **call):
    """The `Run` that the stages of this call would share."""
    caught = []

    def catch(run, *_):
        caught.append(run)
        raise Caught

    pipe._run = catch
    try:
        pipe(**call)
    except Caught:
        return caught[0]
    finally:
        del pipe._run
    raise AssertionError("expected a call that comes to its stages")


def selection_of(run, blocks):
    """The selection of the first so many blocks of each sample."""
    rows, columns = coarse_grid(run.grid)
    chosen = (torch.arange(rows * columns) < blocks).float().reshape(1, rows, columns)
    fine = chosen.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1).expand(run.batch, -1)
    return stages.select(run, fine.contiguous(), 0.5, 0)


def state_of(run, blocks, sigma=0.7):
    """(fine latents, the mixed sequence with so many active blocks), random at one sigma."""
    random = torch.Generator().manual_seed(11)
    fine = torch.randn(run.source.shape, generator=random).to(run.source.dtype)
    coarse = torch.randn(*fine.shape[:2], *(side // 2 for side in fine.shape[2:]), generator=random).to(fine.dtype)
    return fine, stages.expand(run, fine, coarse, sigma, selection_of(run, blocks))


@torch.no_grad()
def check_mixed_step_of_all_blocks(run):
    """With all blocks active a mixed step is a dense one: position ids, text, timestep, references and guidance."""
    blocks = coarse_grid(run.grid)[0] * coarse_grid(run.grid)[1]
    fine, state = state_of(run, blocks)
    at = torch.tensor(700.0)
    mixed = run.velocity(state.tokens, at, state.layouts)
    grids = [run.grid, *(reference.grid for reference in run.references)]
    layouts = [run.model.dense_layout(text, run.pictures, grids) for text in run.texts]
    tokens = torch.cat([pack(x) for x in (fine, *(reference.latents for reference in run.references))], dim=1)
    dense = run.velocity(tokens, at, layouts)
    # the table of a mixed sequence has coarse rows behind the fine ones, of the target and of the condition
    half = 5 * blocks
    row = state.layout.index[:, : tokens.shape[1]].long()
    row = torch.where(row < half, row, row - blocks)
    row = torch.where(row >= 2 * half - blocks, row - blocks, row)
    # clean tokens: a guidance that is a ratio may be 0 / 0 there
    n = state.layout.target_lengths[0]
    in_order = dense.gather(1, row[..., None].expand_as(dense))[:, :n]
    assert torch.allclose(mixed[:, :n], in_order, atol=1e-5) and in_order.std() > 1e-3


@torch.no_grad()
def check_cached_step_while_nothing_moves(run):
    """A step over cached keys and values is the whole step where no token has moved. The run has kv_refresh > 1."""
    _, state = state_of(run, 5)
    at = torch.tensor(700.0)
    whole = run.velocity(state.tokens, at, state.layouts)[:, :20]
    active = run.velocity(state.tokens[:, : state.first], at, state.active_layouts)[:, :20]
    assert torch.allclose(active, whole, atol=1e-5) and whole.std() > 1e-3
    if state.locked_layouts:
        again = run.velocity(state.tokens, at, state.locked_layouts)[:, :20]
        assert torch.allclose(again, whole, atol=1e-5)
