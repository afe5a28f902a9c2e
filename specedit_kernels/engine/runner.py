# SPDX-License-Identifier: Apache-2.0
"""How steps are launched: kernel by kernel, or as CUDA graphs that a few shapes share."""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from . import fp8, low_rank, registry
from ._diffusers import foreign_forward, global_hooks, hooked, on_parallel, unwrapped

logger = logging.getLogger("specedit_kernels")

Inputs = dict[str, Tensor | None]

# Graphs kept at once. A run has one for each of its sequences (coarse, mixed, active, full) and one for each call of
# the autoencoder, so this holds two or three sizes of edits; beside the pool that all share, one takes its inputs (some
# 20 MB at 1024 x 1024) and what the driver keeps of it.
GRAPHS = 16
# Between the names of buffers, where a call uses several.
BESIDE = " + "
# Kept buffers grow in steps of so many rows, so that few edits outgrow the last one.
BUFFER_ROWS = 512


_PLAIN = (torch.nn.Parameter, Tensor)


def inspect(name: str, transformer: torch.nn.Module, vae: torch.nn.Module) -> tuple[str, list[Hashable]]:
    """(why the runner of that name cannot run these, or "", what its graphs take for granted).

    The latter: where weights lie, and the numbers that adapters (PEFT) multiply by. One pass, since a run waits for it.
    """
    transformer, vae = unwrapped(transformer), unwrapped(vae)
    if on_parallel(transformer):
        return "the transformer is parallelised", []
    if global_hooks():
        return "torch has hooks for all modules, which it would leave out", []
    for module, kind in registry.replaced_by(transformer):
        if foreign_forward(module, kind):
            return f"a {type(module).__name__} has a forward that is not its model's, which it would leave out", []
    found: list[Hashable] = []
    devices, known = set(), registry.own_pre_hooks() | {low_rank.add_change}
    for module in (*transformer.modules(), *vae.modules()):
        own = vars(module)  # a module looks for what it does not have for long
        if hooked(own, known):
            return f"a {type(module).__name__} has hooks (offloading, caches), which it would leave out", []
        if "forward" in own and foreign_forward(module):
            return f"a {type(module).__name__} has a forward of its own, which it would leave out", []
        if name == "fused":
            continue
        found.append(type(module))
        for x in (*own["_parameters"].values(), *own["_buffers"].values()):
            if x is None:
                continue
            if type(x) not in _PLAIN and is_traceable_wrapper_subclass(x):
                return f"a weight is a {type(x).__name__}, whose memory cannot be watched", []
            devices.add(x.device)
            found.append((x.data_ptr(), x.dtype))
        if "scaling" in own:
            active = tuple(getattr(module, n, None) for n in ("active_adapters", "disable_adapters", "merged"))
            found.append(repr((module.scaling, active)))
    reason = ""
    if name != "fused" and ({d.type for d in devices} != {"cuda"} or len(devices) > 1):
        reason = f"it needs one CUDA device, the weights are on {', '.join(sorted(map(str, devices)))}"
    return reason, found


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    # one for all captures: cuBLAS keeps a workspace for each stream that it has seen
    return torch.cuda.Stream(device)


def _layout(x: Tensor) -> torch.memory_format:
    """How a captured input lies: pictures with channels last go on so, since convolutions follow them in that."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


class CapturedStep:
    """One call of a function of tensors as a CUDA graph, replayed over new contents of the same shapes."""

    def __init__(self, function: Callable[..., Any], inputs: Inputs, pool: Any):
        device = next(x.device for x in inputs.values() if x is not None)
        # tensors made in inference mode could not be written to outside of it
        with torch.inference_mode(False):
            self.inputs = {
                name: None
                if x is None
                else torch.empty(x.shape, dtype=x.dtype, device=device, memory_format=_layout(x))
                for name, x in inputs.items()
            }
        self._fill(inputs)
        with torch.cuda.device(device):
            # once without: kernels are compiled and libraries make their plans on their first call
            aside, current = _stream(device), torch.cuda.current_stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                function(**self.inputs)
            current.wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                before = torch.cuda.memory_reserved()
                self.output = function(**self.inputs)
                self.pool_bytes = torch.cuda.memory_reserved() - before
        self.input_bytes = sum(x.numel() * x.element_size() for x in self.inputs.values() if x is not None)

    def _fill(self, inputs: Inputs) -> None:
        for name, x in inputs.items():
            if x is not None:
                self.inputs[name].copy_(x)

    def __call__(self, inputs: Inputs) -> Any:
        self._fill(inputs)
        self.graph.replay()
        # the next replay writes over the output
        return tree_map(torch.clone, self.output)


class StepRunner:
    """Calls functions of tensors, and keeps what outlives a call: graphs, buffers of keys and values, fp8 weights.

    name: "fused" calls them; "graph" and "compile" capture each call as a CUDA graph when its tag and shapes are new,
    and replay it from then on. At most `graphs` are kept, the one longest unused goes first; all share one pool of
    memory. A capture that fails ends capturing for good, with a warning: calls go on uncaptured.
    """

    def __init__(self, name: str, graphs: int = GRAPHS):
        self.name = name
        self.captures = 0
        self._limit = graphs
        self._capturing = name != "fused"
        self._graphs: OrderedDict[Hashable, CapturedStep] = OrderedDict()
        self._pool: Any = None
        self._pool_bytes = 0
        self._buffers: dict[str, list[Tensor]] = {}
        self._signature: list[Hashable] | None = None
        # held for a whole call: its steps share buffers and graphs
        self.lock = threading.RLock()
        self._undo: weakref.finalize | None = None
        self.linears = fp8.Fp8Linears()

    @property
    def mode(self) -> str:
        """The name, or "fused" since a capture failed."""
        return self.name if self._capturing else "fused"

    @property
    def graph_bytes(self) -> int:
        """Device memory of the graphs: their pool, and the inputs of each."""
        return self._pool_bytes + sum(step.input_bytes for step in self._graphs.values())

    @property
    def buffer_bytes(self) -> int:
        """Device memory of the buffers."""
        return sum(x.numel() * x.element_size() for kept in self._buffers.values() for x in kept)

    def watches(self, signature: list[Hashable]) -> bool:
        """Whether weights lie where they did at the last call; never, where the signature does not say where."""
        return bool(signature) and signature == self._signature

    def watch(self, signature: list[Hashable]) -> None:
        """Forget all where it is not what it was at the last call."""
        if signature != self._signature or self.linears.stale():
            self.clear()
        self._signature = signature

    def undoes(self, undo: Callable[[], None]) -> None:
        """What puts weights back that were moved for this runner: called by `close`, or when the runner is freed."""
        if self._undo is not None:
            self._undo.detach()
        self._undo = weakref.finalize(self, undo)
        self._undo.atexit = False

    def close(self) -> None:
        """`clear`, and put weights back that were moved."""
        self.clear()
        if self._undo is not None:
            self._undo()

    def clear(self) -> None:
        """Free the graphs and their pool, the buffers, and weights in fp8."""
        self._drop(list(self._graphs))
        self._buffers.clear()
        self.linears.clear()

    def _drop(self, keys: Sequence[Hashable]) -> None:
        if not keys:
            return
        # one of them may still be running
        torch.cuda.synchronize()
        for key in keys:
            del self._graphs[key]
        if not self._graphs:
            self._pool, self._pool_bytes = None, 0

    def buffers(
        self, name: str, count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> list[Tensor]:
        """`count` tensors [B, rows, ...], the same memory at each call: longer ones serve where fewer rows are needed.

        Any other difference ends the old ones.
        """
        batch, rows, *rest = shape
        kept = self._buffers.get(name, [])
        fits = len(kept) == count and all(
            (x.dtype, x.device, x.shape[0], *x.shape[2:]) == (dtype, device, batch, *rest) and x.shape[1] >= rows
            for x in kept[:1]
        )
        if not fits:
            # graphs write to the old ones, which go before there are new ones; "a, b" belongs to "a"
            first = name.split(", ")[0]
            self._drop([key for key in self._graphs if first in key[1].split(BESIDE)])
            kept = self._buffers[name] = []
            whole = (batch, -(-rows // BUFFER_ROWS) * BUFFER_ROWS, *rest)
            with torch.inference_mode(False):
                kept += [torch.empty(whole, dtype=dtype, device=device) for _ in range(count)]
        return [x[:, :rows] for x in kept]

    def __call__(self, tag: Hashable, function: Callable[..., Any], inputs: Inputs, buffers: str = "") -> Any:
        """function(**inputs).

        tag: stands for all that the function depends on besides its inputs. buffers: the name of those that it uses, or
        several with BESIDE between.
        """
        if not self._capturing:
            return function(**inputs)
        shapes = tuple((name, x.shape, x.dtype, _layout(x)) for name, x in inputs.items() if x is not None)
        key = (tag, buffers, shapes, low_rank.active_serial(), fp8.is_active())
        step = self._graphs.get(key)
        if step is None:
            try:
                if self._pool is None:
                    self._pool = torch.cuda.graph_pool_handle()
                step = CapturedStep(function, inputs, self._pool)
            except RuntimeError as error:
                logger.warning("runner=%r: capturing failed, steps go on uncaptured: %s", self.name, error)
                self._capturing = False
                self._drop(list(self._graphs))
                return function(**inputs)
            self._graphs[key] = step
            self._pool_bytes += step.pool_bytes
            self.captures += 1
            self._drop(list(self._graphs)[: -self._limit])
        self._graphs.move_to_end(key)
        return step(inputs)
