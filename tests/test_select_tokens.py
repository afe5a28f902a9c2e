# SPDX-License-Identifier: Apache-2.0
import pytest
import torch


def oracle(score, grid, threshold, dilation, uniform_stride):
    """The contract, token by token, in plain Python."""
    rows, columns = grid
    masks, indices, counts = [], [], []
    for line in score.float().tolist():
        chosen = [not value <= threshold for value in line]
        mask = []
        for r in range(rows):
            for c in range(columns):
                near = any(
                    chosen[y * columns + x]
                    for y in range(max(0, r - dilation), min(rows, r + dilation + 1))
                    for x in range(max(0, c - dilation), min(columns, c + dilation + 1))
                )
                uniform = uniform_stride > 0 and r % uniform_stride == 0 and c % uniform_stride == 0
                mask.append(near or uniform)
        masks.append(mask)
        indices.append([i for i, m in enumerate(mask) if m] + [i for i, m in enumerate(mask) if not m])
        counts.append(sum(mask))
    return masks, indices, counts


def check(score, grid, threshold, dilation=0, uniform_stride=0):
    # The threshold is compared in fp32, as the scores are.
    threshold = float(torch.tensor(threshold, dtype=torch.float32))
    mask, index, count = torch.ops.specedit.select_tokens(score, grid, threshold, dilation, uniform_stride)
    assert (mask.dtype, index.dtype, count.dtype) == (torch.bool, torch.int32, torch.int32)
    assert mask.device == index.device == count.device == score.device
    assert (mask.tolist(), index.tolist(), count.tolist()) == oracle(score, grid, threshold, dilation, uniform_stride)
    return mask, index, count


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (9, 11), (127, 1), (27, 37), (32, 32)], ids=str)
@pytest.mark.parametrize("dilation, uniform_stride", [(0, 0), (1, 0), (0, 3), (2, 4), (300, 0), (0, 1000)])
def test_random_scores(backend, poison, random, device, grid, dilation, uniform_stride):
    score = random(2, grid[0] * grid[1], device=device).abs()
    check(score, grid, 2.0, dilation, uniform_stride)


@pytest.mark.parametrize("threshold", [-1.0, 0.5, float("inf"), float("-inf")])
def test_all_none_and_different_counts(backend, poison, device, threshold):
    score = torch.zeros(3, 12, device=device)
    score[0] = 1
    score[1, 5] = 1
    check(score, (3, 4), threshold)


def test_equality_is_not_selected_and_nan_is(backend, poison, device):
    nan, above = float("nan"), 0.1 + 1e-6
    score = torch.tensor([[0.1, above, nan, 0.0, -nan, float("inf")]], device=device)
    mask, _, count = check(score, (2, 3), 0.1)
    assert mask.tolist() == [[False, True, True, False, True, True]] and count.tolist() == [4]


def test_dilation_does_not_wrap(backend, poison, device):
    score = torch.zeros(1, 20, device=device)
    score[0, 9] = 1  # the last column of row 1
    mask, _, _ = check(score, (4, 5), 0.5, 1)
    assert torch.nonzero(mask[0]).flatten().tolist() == [3, 4, 8, 9, 13, 14]


def test_a_large_grid(backend, poison, random, device):
    """More than one block's worth: 128 x 129 tokens, against PyTorch's own operations."""
    score = random(2, 128 * 129, device=device)
    mask, index, count = torch.ops.specedit.select_tokens(score, (128, 129), 1.5, 1, 3)
    expected = torch.nn.functional.max_pool2d((score > 1.5).float().view(2, 1, 128, 129), 3, 1, 1)[:, 0] > 0
    expected[:, ::3, ::3] = True
    expected = expected.flatten(1)
    assert torch.equal(mask, expected)
    assert torch.equal(count, expected.sum(1, dtype=torch.int32))
    assert torch.equal(index, torch.argsort((~expected).byte(), dim=1, stable=True).int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_scores(backend, poison, random, device, dtype):
    check(random(1, 30, dtype=dtype, device=device), (5, 6), 0.1)


def test_strided_scores(backend, poison, random, device):
    check(random(4, 40, device=device)[::2, 3:33], (5, 6), 0.3, 1)


def test_empty_batch(backend, device):
    mask, index, count = torch.ops.specedit.select_tokens(torch.empty(0, 6, device=device), (2, 3), 0.5)
    assert mask.shape == index.shape == (0, 6) and count.shape == (0,)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(score=torch.zeros(1, 7)), ValueError, r"score: expected shape \[B, 2 \* 3\], got \[1, 7\]"),
        (dict(score=torch.zeros(1, 6, dtype=torch.int32)), TypeError, "score: expected dtype"),
        (dict(threshold=float("nan")), ValueError, "threshold: expected a number"),
        (dict(dilation=-1), ValueError, "dilation: expected an integer >= 0, got -1"),
        (dict(uniform_stride=-2), ValueError, "uniform_stride: expected an integer >= 0, got -2"),
    ],
)
def test_bad_input(change, error, words):
    call = dict(score=torch.zeros(1, 6), grid=(2, 3), threshold=0.5, dilation=0, uniform_stride=0) | change
    with pytest.raises(error, match=words):
        torch.ops.specedit.select_tokens(*call.values())
