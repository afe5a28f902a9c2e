# SPDX-License-Identifier: Apache-2.0
"""What the training scripts share: the run directory, the log, the clock, and files that are never half written."""

import math
import os
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

RUN_DIR = Path(os.environ.get("SPECEDIT_RUN_DIR", "runs/editor"))


def device():
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # An illegal memory access was once seen in cuDNN attention's backward at these shapes.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda")


def autocast(dev):
    """bf16 on the GPU; fp32 on the CPU, unless SPECEDIT_CPU_BF16 is set to try the GPU's arithmetic."""
    if dev.type == "cuda" or os.environ.get("SPECEDIT_CPU_BF16"):
        return torch.autocast(dev.type, torch.bfloat16)
    return nullcontext()


def log(*parts):
    print(time.strftime("%H:%M:%S"), *parts, flush=True)


def replace_file(path, write):
    """Calls write(temporary path), then moves it into place in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    os.replace(temporary, path)


def save_checkpoint(state, path):
    replace_file(path, lambda p: torch.save(state, p))


def load_checkpoint(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def compile_blocks(transformer, dynamic=False):
    """Compiles a transformer's blocks, each shape by itself unless dynamic."""
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 4096
    backend = os.environ.get("SPECEDIT_COMPILE_BACKEND", "inductor")
    transformer.compile_repeated_blocks(dynamic=dynamic, backend=backend)


def memory():
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else "cpu"


class Ranks:
    """The processes that train one model, each on a GPU of its own: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in
    the environment, as torchrun sets them. Without them, one process alone."""

    def __init__(self):
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        if self.count > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    @property
    def first(self):
        return self.rank == 0

    def share(self, values):
        """Rank 0's floats on every rank."""
        if self.count == 1:
            return values
        values_of_rank_0 = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(values_of_rank_0, 0)
        return values_of_rank_0.tolist()

    @torch.no_grad()
    def mean_(self, tensors):
        """Means over the ranks of tensors of one dtype, in place."""
        if self.count == 1:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors]) / self.count
        dist.all_reduce(flat)
        torch._foreach_copy_(
            tensors, [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)]
        )


class Clock:
    """Seconds of training so far, over all pieces of a run, against the budget. done() reads it, on rank 0 for all.

    Where a file STOP appears in the run directory, the run ends `tail` seconds later, and the learning rate falls to
    its end over that time.
    """

    def __init__(self, seconds, elapsed=0.0, tail=45.0, ranks=None):
        self.seconds, self.elapsed, self.tail, self._ranks = seconds, elapsed, tail, ranks
        self._start = time.perf_counter() - elapsed
        self._stopped_at = None

    @property
    def fraction(self):
        return min(self.elapsed / self.seconds, 1.0)

    def poll_stop(self):
        if self._stopped_at is None and (RUN_DIR / "STOP").exists():
            log(f"STOP found: ending in {self.tail:.0f} s")
            self._stopped_at = self.elapsed

    def done(self):
        self.elapsed = time.perf_counter() - self._start
        if self._ranks is not None:
            stopped = math.nan if self._stopped_at is None else self._stopped_at
            self.elapsed, stopped = self._ranks.share([self.elapsed, stopped])
            self._stopped_at = None if math.isnan(stopped) else stopped
        if self._stopped_at is not None and self.elapsed - self._stopped_at >= self.tail:
            return True
        return self.elapsed >= self.seconds

    def decay(self, hold, end):
        """1 up to the fraction `hold` of the budget, then linear to `end`."""

        def at(fraction):
            return 1.0 if fraction < hold else 1.0 + (end - 1.0) * (fraction - hold) / (1.0 - hold)

        if self._stopped_at is None:
            return at(self.fraction)
        start = at(min(self._stopped_at / self.seconds, 1.0))
        share = min((self.elapsed - self._stopped_at) / max(self.tail, 1e-6), 1.0)
        return start + (min(end, start) - start) * share
