# SPDX-License-Identifier: Apache-2.0
"""Grids, noise algebra, schedules and layouts. Means and covariances are exact: linear maps are built, not sampled."""

import itertools
import math

import pytest
import torch

from specedit_kernels.sampling import flops, grid, layout, noise, schedule

SIGMAS = [0.0, 0.1, 0.35, 0.8, 1.0]


def linear_map(function, *shape):
    """Matrix [outputs, inputs] of a linear function of one image [1, 1, *shape], in float64."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, 1, 1, *shape)
    return torch.stack([function(b).flatten() for b in basis], dim=1)


def test_pack_is_flux_packing_and_unpack_inverts_it():
    latent = torch.randn(2, 16, 6, 8)
    tokens = grid.pack(latent)
    assert tokens.shape == (2, 12, 64)
    # channel-major: 4 values of a channel are its 2x2 patch, row by row
    assert torch.equal(tokens[1, 5].reshape(16, 2, 2), latent[1, :, 2:4, 2:4])
    assert torch.equal(grid.unpack(tokens, (3, 4)), latent)


def test_pack_equals_diffusers():
    pipeline = pytest.importorskip("diffusers").FluxKontextPipeline
    latent = torch.randn(2, 16, 6, 8)
    assert torch.equal(grid.pack(latent), pipeline._pack_latents(latent, 2, 16, 6, 8))


def test_unpack_rejects_a_wrong_grid():
    with pytest.raises(ValueError, match="tokens: expected 16 tokens"):
        grid.unpack(torch.zeros(1, 12, 64), (4, 4))


@pytest.mark.parametrize("bad", [(3, 4), (4, 5), (0, 2)])
def test_coarse_grid_needs_whole_blocks(bad):
    with pytest.raises(ValueError, match="grid: expected even"):
        grid.coarse_grid(bad)


def test_draft_grid_rounds_up():
    assert grid.draft_grid((32, 32)) == (8, 8)
    assert grid.draft_grid((42, 98)) == (11, 25)


def test_blocks_there_and_back():
    mask = torch.zeros(1, 24, dtype=torch.bool)
    mask[0, 6 * 3 + 2] = True  # row 3, column 2 of a 4 x 6 grid: block row 1, column 1
    blocks = grid.to_blocks(mask, (4, 6))
    assert blocks.nonzero().tolist() == [[0, 4]]
    fine = grid.from_blocks(blocks, (4, 6)).reshape(4, 6)
    assert fine.nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]


def test_coarse_token_covers_its_block():
    latent = torch.randn(1, 16, 8, 8)
    coarse = grid.pack(grid.pool(latent))  # 2 x 2 coarse tokens
    block = latent[0, :, 4:8, 0:4]  # block row 1, column 0: 2 x 2 fine tokens = 4 x 4 latent pixels
    assert torch.allclose(coarse[0, 2].reshape(16, 2, 2), block.reshape(16, 2, 2, 2, 2).mean(dim=(2, 4)))


def test_positions_of_blocks_are_centres_of_their_children():
    fine = grid.token_positions((4, 6)).reshape(2, 2, 3, 2, 2)
    assert torch.equal(grid.block_positions((4, 6)).reshape(2, 3, 2), fine.mean(dim=(1, 3)))


# noise algebra


def test_hadamard_is_orthonormal_and_its_own_inverse():
    def split(x):
        parent, details = noise.hadamard_split(x)
        return torch.cat([parent.flatten(), details.flatten()])

    matrix = linear_map(split, 4, 4)
    assert torch.allclose(matrix @ matrix.T, torch.eye(16, dtype=torch.float64), atol=1e-14)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    assert torch.allclose(noise.hadamard_merge(*noise.hadamard_split(x)), x, atol=1e-14)


def test_sigmas_of_expansion_and_pooling_are_inverse():
    for sigma in SIGMAS:
        assert noise.pooled_sigma(noise.expanded_sigma(sigma)) == pytest.approx(sigma, abs=1e-15)
    assert noise.expanded_sigma(1.0) == 1.0 and noise.expanded_sigma(0.0) == 0.0


@pytest.mark.parametrize("sigma", SIGMAS)
def test_expand_state_has_exact_mean_and_white_covariance(sigma):
    to = noise.expanded_sigma(sigma)
    # mean: the clean coarse part, upsampled, times 1 - s'
    mean = linear_map(lambda z: noise.expand_state((1 - sigma) * z, sigma, torch.zeros(1, 1, 4, 4).double()), 2, 2)
    up = linear_map(lambda z: z.repeat_interleave(2, -1).repeat_interleave(2, -2), 2, 2)
    assert torch.allclose(mean, (1 - to) * up, atol=1e-14)
    # covariance: coarse noise and detail noise are independent white fields
    of_parent = linear_map(lambda n: noise.expand_state(sigma * n, sigma, torch.zeros(1, 1, 4, 4).double()), 2, 2)
    of_detail = linear_map(lambda n: noise.expand_state(torch.zeros(1, 1, 2, 2).double(), sigma, n), 4, 4)
    covariance = of_parent @ of_parent.T + of_detail @ of_detail.T
    assert torch.allclose(covariance, to**2 * torch.eye(16, dtype=torch.float64), atol=1e-14)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_expansion_with_the_noise_that_was_pooled_gives_that_noise_back(sigma):
    to = noise.expanded_sigma(sigma)
    matrix = linear_map(lambda n: noise.expand_state(sigma * noise.pool_noise(n), sigma, n), 4, 4)
    assert torch.allclose(matrix, to * torch.eye(16, dtype=torch.float64), atol=1e-14)


def test_pool_noise_keeps_noise_white():
    matrix = linear_map(noise.pool_noise, 4, 4)
    assert torch.allclose(matrix @ matrix.T, torch.eye(4, dtype=torch.float64), atol=1e-14)


def test_repeating_packed_tokens_is_not_white():
    # what the block transform on latent pixels avoids: four copies of a token, each a patch, in place of 2x2 pixels
    def repeat(n):
        tokens = grid.pack(n)  # 1 x 1 token
        return grid.unpack(tokens.repeat(1, 4, 1), (2, 2)) / 2 + noise.expand_state(torch.zeros_like(n), 1.0, detail)

    detail = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    of_parent = linear_map(repeat, 2, 2)
    of_detail = linear_map(lambda n: noise.expand_state(torch.zeros(1, 1, 2, 2).double(), 1.0, n), 4, 4)
    covariance = of_parent @ of_parent.T + of_detail @ of_detail.T
    assert (covariance - torch.eye(16, dtype=torch.float64)).abs().max() > 0.2


@pytest.mark.parametrize("sigma", SIGMAS)
def test_pool_state_has_exact_mean_and_white_covariance(sigma):
    to = noise.pooled_sigma(sigma)
    mean = linear_map(lambda z: noise.pool_state((1 - sigma) * z, sigma), 4, 4)
    pooling = linear_map(grid.pool, 4, 4)
    assert torch.allclose(mean, (1 - to) * pooling, atol=1e-14)
    spread = linear_map(lambda n: noise.pool_state(sigma * n, sigma), 4, 4)
    assert torch.allclose(spread @ spread.T, to**2 * torch.eye(4, dtype=torch.float64), atol=1e-14)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("rise", [lambda s: s, noise.expanded_sigma, lambda s: (1 + s) / 2])
def test_top_up_has_exact_mean_and_white_covariance(sigma, rise):
    to = rise(sigma)
    zero = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    mean = linear_map(lambda z: noise.top_up((1 - sigma) * z, sigma, to, zero), 2, 2)
    assert torch.allclose(mean, (1 - to) * torch.eye(4, dtype=torch.float64), atol=1e-14)
    old = linear_map(lambda n: noise.top_up(sigma * n, sigma, to, zero), 2, 2)
    new = linear_map(lambda n: noise.top_up(zero, sigma, to, n), 2, 2)
    assert torch.allclose(old @ old.T + new @ new.T, to**2 * torch.eye(4, dtype=torch.float64), atol=1e-14)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0])
def test_a_noised_picture_pools_to_the_pooled_picture_with_the_pooled_noise(sigma):
    clean, white = torch.randn(2, 1, 2, 6, 6)
    assert torch.equal(noise.noised(clean, 0.0, white), clean) and torch.equal(noise.noised(clean, 1.0, white), white)
    fine = noise.noised(clean.bfloat16(), sigma, white)
    assert fine.dtype == torch.float32
    expected = noise.noised(grid.pool(clean.bfloat16().float()), noise.pooled_sigma(sigma), noise.pool_noise(white))
    assert torch.allclose(noise.pool_state(fine, sigma), expected, atol=1e-6)


def test_top_up_cannot_take_noise_away():
    with pytest.raises(ValueError, match="to_sigma: expected sigma <= to_sigma"):
        noise.top_up(torch.zeros(1, 1, 2, 2), 0.5, 0.4, torch.zeros(1, 1, 2, 2))


# schedules


def plain_sigmas(n, shift=3.0):
    t = [1 - i / n for i in range(n + 1)]
    return [shift * x / (1 + (shift - 1) * x) for x in t]


@pytest.mark.parametrize("stages", [(3, 3, 3), (0, 4, 2), (5, 0, 3), (2, 6, 0), (0, 0, 4), (4, 0, 0)])
def test_stage_sigmas_meet_at_the_transitions(stages):
    sigmas = plain_sigmas(sum(stages))
    plan = schedule.stage_sigmas(sigmas, *stages)
    assert [len(p) for p in (plan.coarse, plan.mixed, plan.full)] == [n + 1 for n in stages]
    for part in (plan.coarse, plan.mixed, plan.full):
        assert all(a > b for a, b in itertools.pairwise(part))
    # the noise that an expansion leaves is where the next stage begins, and the tail is the plain schedule's own
    assert noise.expanded_sigma(plan.coarse[-1]) == pytest.approx(sigmas[stages[0]])
    assert plan.mixed[0] == pytest.approx(sigmas[stages[0]])
    if stages[1] and stages[2]:
        assert noise.expanded_sigma(plan.mixed[-1]) == pytest.approx(plan.full[0])
    assert list(plan.full) == sigmas[stages[0] + stages[1] :]
    if not stages[2]:
        assert plan.mixed[-1] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("sigmas", "stages", "message"),
    [
        ([1.0, 0.0], (1, 1, 0), "sigmas: expected 3 sigmas"),
        ([1.0, 1.0, 0.0], (1, 1, 0), "strictly decreasing"),
        ([1.5, 1.0, 0.0], (1, 1, 0), r"within \[0, 1\]"),
        ([1.0], (0, 0, 0), "stages: expected"),
        ([1.0, 0.0], (2, -1, 0), "stages: expected"),
    ],
)
def test_stage_sigmas_rejects(sigmas, stages, message):
    with pytest.raises(ValueError, match=message):
        schedule.stage_sigmas(sigmas, *stages)


def test_split_steps_keeps_shares_and_used_stages():
    assert schedule.split_steps((3, 3, 3), 9) == (3, 3, 3)
    assert schedule.split_steps((3, 3, 3), 18) == (6, 6, 6)
    assert schedule.split_steps((8, 14, 8), 3) == (1, 1, 1)
    assert schedule.split_steps((5, 0, 3), 4)[1] == 0
    for steps in range(3, 60):
        counts = schedule.split_steps((8, 14, 8), steps)
        assert sum(counts) == steps and min(counts) >= 1
    with pytest.raises(ValueError, match="steps: expected at least 3"):
        schedule.split_steps((3, 3, 3), 2)


def test_flops_of_flux_kontext():
    assert flops.transformer_flops(8704, 8704, 3072, 57) == pytest.approx(165.4e12, rel=1e-3)
    assert flops.transformer_flops(4608, 4608, 3072, 57) == pytest.approx(3719.50e12 / 50, rel=2e-3)


# layout


def reference_sequence(active, shape, coarse_condition, condition=True, others=0):
    """Rows in order for one sample, written as a loop over the blocks."""
    rows, columns = shape[0] // 2, shape[1] // 2
    n = shape[0] * shape[1]
    order = [b for b in range(rows * columns) if active[b]] + [b for b in range(rows * columns) if not active[b]]
    half = []
    for b in order:
        r, c = divmod(b, columns)
        if active[b]:
            half += [(2 * r + i) * shape[1] + 2 * c + j for i in range(2) for j in range(2)]
        else:
            half.append(n + b)
    behind = (half if coarse_condition else range(n)) if condition else []
    table = n + n // 4
    return half, half + [table + row for row in behind] + [2 * table + row for row in range(others)]


@pytest.mark.parametrize("others", [0, 7])
@pytest.mark.parametrize(("coarse_condition", "condition"), [(True, True), (False, True), (True, False)])
def test_layout_equals_a_loop(coarse_condition, condition, others):
    shape = (4, 6)
    active = torch.tensor([[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]]).bool()
    order = (~active).int().argsort(dim=1, stable=True).int()
    count = active.sum(dim=1).int()
    parts = (coarse_condition, condition, others)
    expected = [reference_sequence(a.tolist(), shape, *parts) for a in active]
    lengths = [layout.sequence_length(int(c), shape, *parts) for c in count]
    assert [(len(t), len(s)) for t, s in expected] == lengths
    capacity = max(len(s) for _, s in expected) + 3
    got = layout.build_layout(order, count, shape, capacity, *parts)
    assert got.index.dtype == torch.int32 and got.index.shape == (4, capacity)
    for i, (target, rows) in enumerate(expected):
        assert got.index[i].tolist() == rows + [-1] * (capacity - len(rows))
        assert got.target_slots()[i].sum() == len(target)
        assert got.fine_target_slots()[i].sum() == 4 * count[i]
    assert got.lengths.tolist() == [s for _, s in lengths]


def test_layout_rejects_wrong_shapes():
    with pytest.raises(ValueError, match=r"order: expected \[B, 6\]"):
        layout.build_layout(torch.zeros(1, 5).int(), torch.zeros(1).int(), (4, 6), 10)
    with pytest.raises(ValueError, match=r"count: expected \[1\]"):
        layout.build_layout(torch.zeros(1, 6).int(), torch.zeros(2).int(), (4, 6), 10)


def test_multiplicities_stand_for_the_whole_grid():
    shape = (4, 6)
    active = torch.tensor([[0, 1, 0, 0, 1, 0]]).bool()
    order = (~active).int().argsort(dim=1, stable=True).int()
    target, total = layout.sequence_length(2, shape)
    got = layout.build_layout(order, active.sum(dim=1), shape, total)
    weights = layout.table_key_bias(shape)[got.index[0].long()].exp()
    assert weights[:target].sum() == pytest.approx(24) and weights[target:].sum() == pytest.approx(24)


def test_table_positions_are_in_fine_units():
    positions = layout.table_positions((4, 6))
    assert positions.shape == (layout.table_rows((4, 6)), 3)
    assert positions[0].tolist() == [0, 0, 0] and positions[23].tolist() == [0, 3, 5]
    assert positions[24].tolist() == [0, 0.5, 0.5] and positions[29].tolist() == [0, 2.5, 4.5]
    assert torch.equal(positions[30:, 1:], positions[:30, 1:]) and (positions[30:, 0] == 1).all()


@pytest.mark.parametrize("coarse", [False, True])
def test_further_pictures_in_the_table(coarse):
    others = [(2, (2, 4)), (3, (4, 2))]
    positions = layout.table_positions((4, 6), others=others, coarse_others=coarse)
    sizes = [layout.picture_rows(g, coarse) for _, g in others]
    assert sizes == ([2, 2] if coarse else [8, 8])
    assert len(positions) == layout.table_rows((4, 6), sum(sizes))
    assert torch.equal(positions[:60], layout.table_positions((4, 6)))
    assert positions[60:, 0].tolist() == [2] * sizes[0] + [3] * sizes[1]
    last = positions[-1].tolist()
    assert last == ([3, 2.5, 0.5] if coarse else [3, 3, 1])
    bias = layout.table_key_bias((4, 6), others=[g for _, g in others], coarse_others=coarse)
    assert torch.equal(bias[:60], layout.table_key_bias((4, 6)))
    assert bias[60:].exp().sum().item() == pytest.approx(16)
