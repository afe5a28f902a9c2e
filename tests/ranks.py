# SPDX-License-Identifier: Apache-2.0
"""Functions run by several processes of one gloo group on CPUs, as `torchrun` has them on GPUs."""

import contextlib
import datetime
import multiprocessing
import pickle
import traceback

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

# processes are forked, which a process that has used CUDA must not; GPUs: bench/models/several_gpus.py
CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="forks a process that has CUDA")


def _rank(rank, size, folder, seconds, function, args):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size,
            timeout=datetime.timedelta(seconds=seconds),
        )  # fmt: skip
        found = True, function(*args)
    except BaseException:
        found = False, traceback.format_exc()
    with open(folder / f"{rank}", "wb") as file:
        pickle.dump(found, file)
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def on_ranks(size, folder, function, *args, seconds=60, dies=()):
    """[what function(*args) gives on each rank]; None of those that die. AssertionError where one fails."""
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_rank, args=(rank, size, folder, seconds, function, args)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for rank, process in enumerate(processes):
        if rank not in dies:
            process.join(seconds + 30)
    for process in processes:
        process.kill()
        process.join()
    results, failed = [], []
    for rank in range(size):
        good, found = True, None
        if rank not in dies:
            with open(folder / f"{rank}", "rb") as file:
                good, found = pickle.load(file)
        results.append(found)
        if not good:
            failed.append(f"rank {rank}: {found}")
    # what the others lost it by comes last
    assert not failed, "\n".join(sorted(failed, key=lambda text: "another rank has ended" in text))
    return results


def share_sequence(transformer, size, **options):
    """enable_parallelism on CPUs, of which diffusers counts none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "device_count", lambda: size)
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size, **options))
