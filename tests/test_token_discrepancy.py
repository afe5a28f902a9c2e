# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from budget import assert_within_budget

from specedit_kernels.reference.token_discrepancy import token_discrepancy as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def eager(draft, source, rows, columns):
    """The formula of eq. 6 with every intermediate at the inputs' dtype."""
    channel = 1 if draft.dim() == 4 else 2

    def unit(x):
        return x / x.norm(dim=channel, keepdim=True).clamp_min(1e-6)

    distance = (unit(draft) - unit(source)).square().sum(channel)
    if draft.dim() == 4:
        distance = torch.nn.functional.avg_pool2d(
            distance[:, None], (draft.shape[2] // rows, draft.shape[3] // columns)
        ).flatten(1)
    return distance.float()


def check(draft, source, grid):
    score = torch.ops.specedit.token_discrepancy(draft, source, grid)
    oracle = reference(draft.double(), source.double(), *grid)
    assert score.dtype == torch.float32
    assert_within_budget(score, oracle, eager(draft, source, *grid))
    return score


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 64, 129])
@pytest.mark.parametrize("tokens", [(1, 1), (1, 7), (9, 11), (127, 1)], ids=str)
def test_features(backend, poison, random, device, dtype, channels, tokens):
    shape = (2, tokens[0] * tokens[1], channels)
    check(random(*shape, dtype=dtype, device=device), random(*shape, dtype=dtype, device=device), tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape, grid",
    [
        ((1, 8, 4, 4), (4, 4)),
        ((2, 33, 6, 10), (3, 5)),
        ((1, 64, 8, 8), (2, 2)),
        ((3, 5, 7, 9), (1, 1)),
        ((1, 16, 16, 32), (4, 4)),
    ],
    ids=str,
)
def test_maps(backend, poison, random, device, dtype, layout, shape, grid):
    draft, source = (random(*shape, dtype=dtype, device=device) for _ in range(2))
    if layout == "channels_last":
        draft, source = (x.to(memory_format=torch.channels_last) for x in (draft, source))
    check(draft, source, grid)


def test_strides(backend, poison, random, device):
    wide = random(2, 12, 40, device=device)
    check(wide[:, :, 8:24], random(2, 12, 16, device=device), (3, 4))
    check(wide[:, ::2, 8:24], wide[:, 1::2, 8:24], (3, 2))
    image = random(2, 6, 10, 12, device=device)
    check(image[:, :, 2:6, 4:8], image[:, :, 4:8, 0:4], (2, 2))
    # One contiguous, the other channels_last.
    check(image, random(2, 6, 10, 12, device=device).to(memory_format=torch.channels_last), (5, 3))


def test_layouts_agree(backend, random, device):
    draft, source = (random(1, 32, 8, 8, device=device) for _ in range(2))
    maps = torch.ops.specedit.token_discrepancy(draft, source, (8, 8))
    tokens = torch.ops.specedit.token_discrepancy(
        draft.flatten(2).transpose(1, 2).contiguous(), source.flatten(2).transpose(1, 2).contiguous(), (8, 8)
    )
    torch.testing.assert_close(maps, tokens, rtol=1e-5, atol=1e-6)


def test_known_values(backend, device):
    """Two zero vectors 0, one zero vector 1, equal 0, orthogonal 2, opposite 4; length plays no part."""
    draft = torch.tensor([[0, 0], [0, 0], [3, 4], [1, 0], [0, 2]], dtype=torch.float32, device=device)[None]
    source = torch.tensor([[0, 0], [5, 0], [6, 8], [0, 7], [0, -1]], dtype=torch.float32, device=device)[None]
    score = torch.ops.specedit.token_discrepancy(draft, source, (1, 5))
    expected = torch.tensor([[0, 1, 0, 2, 4]], dtype=torch.float32, device=device)
    torch.testing.assert_close(score, expected, rtol=1e-6, atol=1e-6)
    assert (score >= 0).all()


def test_tiny_vectors_are_clamped(backend, device):
    """Below 1e-6 a vector is divided by 1e-6, not by its norm: noise around zero does not become a direction."""
    draft = torch.tensor([[[1e-7, 0.0]]], device=device)
    source = torch.tensor([[[0.0, 1e-8]]], device=device)
    score = torch.ops.specedit.token_discrepancy(draft, source, (1, 1))
    torch.testing.assert_close(score, torch.tensor([[0.1**2 + 0.01**2]], device=device), rtol=1e-3, atol=0)


@pytest.mark.slow
def test_equal_inputs_score_zero(backend, random, device):
    x = random(1, 50, 640, dtype=torch.bfloat16, device=device)
    score = torch.ops.specedit.token_discrepancy(x, x.clone(), (5, 10))
    assert (score >= 0).all() and score.max() <= 1e-5


def test_nan_stays_in_its_cell(backend, random, device):
    draft, source = random(1, 4, 4, 4, device=device), random(1, 4, 4, 4, device=device)
    draft[0, 2, 1, 3] = float("nan")
    source[0, 0, 3, 0] = float("nan")
    score = torch.ops.specedit.token_discrepancy(draft, source, (2, 2))
    assert score.isnan().tolist() == [[False, True, True, False]]


def test_empty_batch(backend, device):
    x = torch.empty(0, 8, 4, 4, device=device)
    assert torch.ops.specedit.token_discrepancy(x, x, (2, 2)).shape == (0, 4)


@pytest.mark.slow
def test_deterministic(backend, random, device):
    draft, source = (random(2, 300, 16, 16, dtype=torch.bfloat16, device=device) for _ in range(2))
    first = torch.ops.specedit.token_discrepancy(draft, source, (4, 4))
    for _ in range(3):
        assert torch.equal(first, torch.ops.specedit.token_discrepancy(draft, source, (4, 4)))


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(source=torch.zeros(1, 4, 9)), ValueError, "source: expected draft's shape"),
        (dict(source=torch.zeros(1, 4, 8).half()), TypeError, "source: expected draft's dtype"),
        (dict(draft=torch.zeros(1, 4, 8).double()), TypeError, "draft: expected dtype bfloat16 or float16 or float32"),
        (dict(draft=torch.zeros(4, 8)), ValueError, r"draft: expected \[B, C, H, W\] or \[B, N, C\]"),
        (dict(grid=(3, 2)), ValueError, r"N = 3 \* 2"),
        (dict(grid=(0, 4)), ValueError, "grid: expected positive"),
        (dict(grid=(4,)), ValueError, r"grid: expected \(rows, columns\)"),
        (dict(draft=torch.zeros(1, 4, 8, requires_grad=True)), ValueError, "draft: expected a tensor that does not"),
        (
            dict(draft=torch.zeros(1, 2, 5, 4), source=torch.zeros(1, 2, 5, 4)),
            ValueError,
            r"H, W multiples of grid \(2, 2\)",
        ),
    ],
)
def test_bad_input(change, error, words):
    call = dict(draft=torch.zeros(1, 4, 8), source=torch.zeros(1, 4, 8), grid=(2, 2)) | change
    with pytest.raises(error, match=words):
        torch.ops.specedit.token_discrepancy(call["draft"], call["source"], call["grid"])
