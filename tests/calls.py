# SPDX-License-Identifier: Apache-2.0
"""What the ops' tests share: an index of distinct rows, tensors of every dtype, maps with channels last, the count of a
call's launches."""

import torch

_UNUSUAL = (
    "float64", "complex32", "complex64", "complex128", "int8", "int16", "int32", "uint16", "uint32", "uint64",
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
)  # fmt: skip


def _poisonable(dtype):
    """Whether this torch can make uninitialised memory of a dtype read as something else (torch 2.11: no float4)."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        torch.empty(1, dtype=dtype)
    except (RuntimeError, NotImplementedError):
        return False
    finally:
        torch.use_deterministic_algorithms(before)
    return True


EVERY_DTYPE = [d for name in _UNUSUAL if (d := getattr(torch, name, None)) is not None and _poisonable(d)]


def channels_last(x):
    """A map [B, C, ...] with its channels last in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def bits(random, *shape, dtype, device):
    """Random bits as numbers of ``dtype``."""
    words = (random(*shape, dtype.itemsize) * 1000).to(torch.int64).to(torch.uint8)
    return words.to(device).view(dtype).squeeze(-1)


def as_bytes(x):
    """uint8 [..., size of an element] on the CPU."""
    return x.cpu().unsqueeze(-1).view(torch.uint8)


def distinct_rows(batch, slots, rows, device):
    """int32 [batch, slots]: distinct rows in any order, -1 in every third slot and where there are not enough."""
    generator = torch.Generator().manual_seed(3)
    index = torch.stack([torch.randperm(max(rows, slots), generator=generator)[:slots] for _ in range(batch)]).int()
    index[index >= rows] = -1
    index[:, ::3] = -1
    return index.to(device)


def launches(run):
    """Names of the kernels that a call of `run` launches on the GPU, after one to warm up."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
