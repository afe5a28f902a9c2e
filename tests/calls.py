# SPDX-License-Identifier: Apache-2.0
"""What the tests of the in-place ops share: an index of distinct rows, and the count of a call's launches."""

import torch


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
