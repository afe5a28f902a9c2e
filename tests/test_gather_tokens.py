# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from calls import EVERY_DTYPE, as_bytes, bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def oracle(x, index, length):
    y = torch.zeros(x.shape[0], length, *x.shape[2:], dtype=x.dtype)
    for b in range(x.shape[0]):
        for i in range(length):
            row = int(index[b, i])
            if row >= 0:
                y[b, i] = x[b, row].cpu()
    return y


def check(x, index, length):
    y = torch.ops.specedit.gather_tokens(x, index, length)
    assert y.is_contiguous() and y.dtype == x.dtype and y.device == x.device
    assert torch.equal(y.cpu(), oracle(x, index, length))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", [(), (1,), (3,), (64,), (2, 8), (3, 5, 7)], ids=str)
def test_rows(backend, poison, random, integers, device, dtype, tail):
    x = (random(2, 13, *tail, device=device) * 10).to(dtype)
    check(x, integers(-1, 13, (2, 9), device), 9)
    check(x, integers(-1, 13, (2, 9), device), 5)


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
@pytest.mark.parametrize("tail", [(), (3,), (2, 8)], ids=str)
def test_every_dtype_that_torch_has(backend, poison, random, integers, device, dtype, tail):
    """Rows are copied bit by bit, so that no dtype is refused."""
    x = bits(random, 2, 13, *tail, dtype=dtype, device=device)
    index = integers(-1, 13, (2, 9), device)
    y = torch.ops.specedit.gather_tokens(x, index, 9)
    assert y.dtype == dtype and y.is_contiguous()
    assert torch.equal(as_bytes(y), oracle(as_bytes(x), index, 9))
    assert not as_bytes(torch.ops.specedit.gather_tokens(x[:, :0], torch.full_like(index, -1), 9)).any()


def test_a_lazy_conjugate_reads_as_what_it_means(backend, random, integers, device):
    x = torch.view_as_complex(random(2, 13, 4, 2, device=device))
    index = integers(-1, 13, (2, 9), device)
    want = torch.ops.specedit.gather_tokens(x, index, 9).conj().resolve_conj()
    assert torch.equal(torch.ops.specedit.gather_tokens(x.conj(), index, 9), want)


@pytest.mark.parametrize("length", [0, 1, 7, 99, 127, 999])
def test_odd_lengths(backend, poison, random, integers, device, length):
    check(random(1, 130, 24, device=device), integers(-1, 130, (1, max(length, 1)), device), length)


def test_all_empty_and_no_rows(backend, poison, random, device):
    empty = torch.full((2, 4), -1, dtype=torch.int32, device=device)
    check(random(2, 5, 8, device=device), empty, 4)
    check(torch.empty(2, 0, 8, device=device), empty, 4)
    check(torch.empty(0, 5, 8, device=device), empty[:0], 4)
    check(torch.empty(2, 5, 0, device=device), empty, 4)


def test_strides(backend, poison, random, integers, device):
    wide = random(2, 30, 4, 40, device=device)
    index = integers(-1, 15, (4, 9), device)[::2, 1::2]
    check(wide[:, ::2, 1:3, 3:20], index, 4)
    check(wide.transpose(1, 2)[:, :, ::2].transpose(1, 2), index, 3)


def test_selected_tokens_come_first(backend, random, device):
    """The use: index and count of select_tokens, at a fixed capacity."""
    x = random(1, 6, 4, device=device)
    score = torch.tensor([[0, 1, 0, 1, 1, 0.0]], device=device)
    _, index, count = torch.ops.specedit.select_tokens(score, (2, 3), 0.5)
    y = torch.ops.specedit.gather_tokens(x, index, 4)
    assert count.tolist() == [3] and torch.equal(y[0, :3], x[0, [1, 3, 4]])


def test_an_index_out_of_range_reads_nothing(backend, random, device, monkeypatch):
    x = random(1, 4, 8, device=device)
    index = torch.tensor([[1, 4]], dtype=torch.int32, device=device)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="index: expected values from -1 to 3, got values from 1 to 4"):
            torch.ops.specedit.gather_tokens(x, index, 2)
    else:
        monkeypatch.setenv("SPECEDIT_DEBUG", "1")
        with pytest.raises(ValueError, match="index: expected values from -1 to 3, got values from 1 to 4"):
            torch.ops.specedit.gather_tokens(x, index, 2)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(index=torch.zeros(1, 3)), TypeError, "index: expected dtype int32"),
        (dict(index=torch.zeros(2, 3, dtype=torch.int32)), ValueError, r"index: expected shape \[B=1, >= length\]"),
        (dict(length=4), ValueError, "length: expected 0 to 3"),
        (dict(length=-1), ValueError, "length: expected 0 to 3"),
        (dict(x=torch.zeros(5)), ValueError, r"x: expected \[B, N, ...\]"),
        (dict(x=torch.zeros(1, 5, 8, 2).transpose(2, 3)), ValueError, "x: expected a contiguous last dimension"),
        (dict(x=torch.zeros(1, 5, 8, requires_grad=True)), ValueError, "x: expected a tensor that does not require"),
    ],
)
def test_bad_input(change, error, words):
    call = dict(x=torch.zeros(1, 5, 8), index=torch.zeros(1, 3, dtype=torch.int32), length=3) | change
    with pytest.raises(error, match=words):
        torch.ops.specedit.gather_tokens(*call.values())
