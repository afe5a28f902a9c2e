# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from calls import EVERY_DTYPE, as_bytes, bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def check(dst, src, index):
    expected = dst.clone().cpu()
    for b in range(src.shape[0]):
        for i in range(src.shape[1]):
            row = int(index[b, i])
            if row >= 0:
                expected[b, row] = src[b, i].cpu()
    assert torch.ops.specedit.scatter_tokens_(dst, src, index) is None
    assert torch.equal(dst.cpu(), expected)


def unique_index(batch, slots, rows, device):
    """Distinct destinations, every third slot empty."""
    generator = torch.Generator().manual_seed(2)
    index = torch.stack([torch.randperm(max(rows, slots), generator=generator)[:slots] for _ in range(batch)]).int()
    index[index >= rows] = -1
    index[:, ::3] = -1
    return index.to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", [(), (1,), (3,), (64,), (2, 8), (3, 5, 7)], ids=str)
def test_rows(backend, random, device, dtype, tail):
    dst = (random(2, 13, *tail, device=device) * 10).to(dtype)
    src = (random(2, 9, *tail, device=device) * 10).to(dtype)
    check(dst, src, unique_index(2, 9, 13, device))


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("tail", [(), (3,), (2, 8)], ids=str)
def test_every_dtype_that_torch_has(backend, random, device, dtype, tail):
    """Rows are copied bit by bit, so that no dtype is refused."""
    dst, src = (bits(random, 2, rows, *tail, dtype=dtype, device=device) for rows in (13, 9))
    index = unique_index(2, 9, 13, device)
    want = as_bytes(dst).clone()
    torch.ops.specedit.scatter_tokens_(dst, src, index)
    for b, i in (index >= 0).nonzero():
        want[b, index[b, i]] = as_bytes(src)[b, i]
    assert torch.equal(as_bytes(dst), want)


@pytest.mark.parametrize("length", [0, 1, 7, 99, 127, 999])
def test_odd_lengths(backend, random, device, length):
    check(
        random(1, 1000, 24, device=device), random(1, length, 24, device=device), unique_index(1, length, 1000, device)
    )


def test_a_wider_index_and_no_rows(backend, random, device):
    """Columns past the rows of src are not read, as in gather_tokens."""
    index = unique_index(2, 9, 13, device)
    check(random(2, 13, 8, device=device), random(2, 4, 8, device=device), index)
    check(torch.empty(2, 0, 8, device=device), random(2, 4, 8, device=device), torch.full_like(index, -1))
    check(torch.empty(0, 5, 8, device=device), torch.empty(0, 4, 8, device=device), index[:0])


def test_strides(backend, random, device):
    base = random(2, 30, 4, 40, device=device)
    before = base.clone()
    view = base[:, ::2, 1:3, 3:20]
    check(view, random(2, 16, 2, 34, device=device)[:, ::2, :, 10:27], unique_index(2, 8, 15, device))
    view.copy_(before[:, ::2, 1:3, 3:20])
    assert torch.equal(base, before), "elements outside the view were written"


def test_gather_then_scatter_restores(backend, random, device):
    x = random(2, 24, 16, device=device)
    index = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(b)) for b in range(2)]).int()
    index = index.to(device)
    dst = torch.full_like(x, float("nan"))
    torch.ops.specedit.scatter_tokens_(dst, torch.ops.specedit.gather_tokens(x, index, 24), index)
    assert torch.equal(dst, x)


def test_debug_finds_duplicates(backend, device, monkeypatch):
    monkeypatch.setenv("SPECEDIT_DEBUG", "1")
    dst = torch.zeros(2, 4, 8, device=device)
    index = torch.tensor([[0, 1, -1, -1], [2, 0, 2, -1]], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"index: expected each destination once, got \[2\] more than once in batch"):
        torch.ops.specedit.scatter_tokens_(dst, torch.ones(2, 4, 8, device=device), index)
    assert not dst.any()


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(src=torch.ones(1, 3, 7)), ValueError, "src: expected shape"),
        (dict(src=torch.ones(1, 3, 8).half()), TypeError, "src: expected dst's dtype"),
        (dict(index=torch.zeros(1, 2, dtype=torch.int32)), ValueError, r"index: expected shape \[B=1, >= 3\]"),
        (dict(index=torch.zeros(1, 3, dtype=torch.int64)), TypeError, "index: expected dtype int32"),
        (dict(index=torch.tensor([[0, 1, 5]], dtype=torch.int32)), ValueError, "index: expected values from -1 to 4"),
        (dict(src=torch.ones(1, 3, 8, requires_grad=True)), ValueError, "src: expected a tensor that does not"),
    ],
)
def test_bad_input_leaves_dst(change, error, words):
    call = dict(dst=torch.zeros(1, 5, 8), src=torch.ones(1, 3, 8), index=torch.tensor([[0, 1, 2]]).int()) | change
    with pytest.raises(error, match=words):
        torch.ops.specedit.scatter_tokens_(*call.values())
    assert not call["dst"].any()
