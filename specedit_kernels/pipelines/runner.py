# SPDX-License-Identifier: Apache-2.0
"""How steps are launched: kernel by kernel, or as CUDA graphs that a few shapes share."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

logger = logging.getLogger("specedit_kernels")

Inputs = dict[str, Tensor | None]

# Graphs kept at once. A run has one for each of its sequences (coarse, mixed, active, full) and one for each call of
# the autoencoder, so this holds two or three sizes of edits; beside the pool that all share, one takes its inputs (some
# 20 MB at 1024 x 1024) and what the driver keeps of it.
GRAPHS = 16
# Kept buffers grow in steps of so many rows, so that few edits outgrow the last one.
BUFFER_ROWS = 1024


def _hooked(module: torch.nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    by_library = hasattr(module, "_hf_hook") or bool(registry and registry.hooks)
    return by_library or bool(module._forward_hooks or module._forward_pre_hooks)


def refusal(name: str, *modules: torch.nn.Module) -> str:
    """Why the runner of that name cannot run the forward of these modules, or ""."""
    paths = (path or type(root).__name__ for root in modules for path, m in root.named_modules() if _hooked(m))
    hooked = next(paths, None)
    if hooked is not None:
        return f"{hooked} has hooks (offloading, caches), which it would leave out"
    if getattr(modules[0], "_parallel_config", None) is not None:
        return "the transformer is parallelised"
    if name == "fused":
        return ""
    devices = {p.device for root in modules for p in root.parameters()}
    if {d.type for d in devices} != {"cuda"} or len(devices) > 1:
        return f"it needs one CUDA device, the weights are on {', '.join(sorted(map(str, devices)))}"
    odd = next((type(p).__name__ for r in modules for p in r.parameters() if is_traceable_wrapper_subclass(p)), None)
    return "" if odd is None else f"a weight is a {odd}, whose memory cannot be watched"


def _signature(modules: Sequence[torch.nn.Module]) -> list[Hashable]:
    """What a captured graph takes for granted: where weights lie, and the numbers that adapters (PEFT) multiply by."""
    found: list[Hashable] = []
    for root in modules:
        for module in root.modules():
            found.append(type(module))
            tensors = (*module._parameters.values(), *module._buffers.values())
            found += [(x.data_ptr(), x.dtype, x.device) for x in tensors if x is not None]
            if hasattr(module, "scaling"):
                active = tuple(getattr(module, n, None) for n in ("active_adapters", "disable_adapters", "merged"))
                found.append(repr((module.scaling, active)))
    return found


class CapturedStep:
    """One call of a function of tensors as a CUDA graph, replayed over new contents of the same shapes."""

    def __init__(self, function: Callable[..., Tensor], inputs: Inputs, pool: Any):
        device = next(x.device for x in inputs.values() if x is not None)
        # tensors made in inference mode could not be written to outside of it
        with torch.inference_mode(False):
            self.inputs = {
                name: None if x is None else torch.empty(x.shape, dtype=x.dtype, device=device)
                for name, x in inputs.items()
            }
        self._fill(inputs)
        with torch.cuda.device(device):
            # once without: kernels are compiled and libraries make their plans on their first call
            aside, current = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                function(**self.inputs)
            current.wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                before = torch.cuda.memory_reserved()
                self.output = function(**self.inputs)
                grown = torch.cuda.memory_reserved() - before
        held = (x for x in self.inputs.values() if x is not None)
        self.bytes = grown + sum(x.numel() * x.element_size() for x in held)

    def _fill(self, inputs: Inputs) -> None:
        for name, x in inputs.items():
            if x is not None:
                self.inputs[name].copy_(x)

    def __call__(self, inputs: Inputs) -> Tensor:
        self._fill(inputs)
        self.graph.replay()
        # the next replay writes over the output
        return self.output.clone()


class StepRunner:
    """Calls functions of tensors, and keeps what outlives a call: graphs, and buffers of keys and values.

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
        self._buffers: dict[str, Tensor] = {}
        self._signature: list[Hashable] | None = None

    @property
    def graph_bytes(self) -> int:
        """Device memory of the graphs that are kept: their pool as far as it grew for them, and their inputs."""
        return sum(step.bytes for step in self._graphs.values())

    @property
    def buffer_bytes(self) -> int:
        """Device memory of the buffers."""
        return sum(x.numel() * x.element_size() for x in self._buffers.values())

    def watch(self, *modules: torch.nn.Module) -> None:
        """Forget the graphs where the weights moved, or adapters changed, since the last call of this."""
        if not self._capturing:
            return
        now = _signature(modules)
        if now != self._signature:
            self.clear()
        self._signature = now

    def clear(self) -> None:
        """Free the graphs and their pool, and the buffers."""
        self._graphs.clear()
        self._buffers.clear()
        self._pool = None

    def buffer(self, name: str, shape: Sequence[int], rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory of that name and shape, the same one at each call; what it holds stays until the next one grows it.

        rows: the dimension that may be cut from a longer buffer. Another size of any other ends the old one.
        """
        kept = self._buffers.get(name)
        wanted = [math.ceil(n / BUFFER_ROWS) * BUFFER_ROWS if i == rows else n for i, n in enumerate(shape)]
        fits = kept is not None and kept.dtype == dtype and kept.device == device and all(
            have >= want if i == rows else have == want for i, (have, want) in enumerate(zip(kept.shape, wanted))
        )  # fmt: skip
        if not fits:
            # graphs write to the old one
            self._graphs = OrderedDict((k, v) for k, v in self._graphs.items() if k[1] != name)
            self._buffers.pop(name, None)
            with torch.inference_mode(False):
                kept = self._buffers[name] = torch.empty(wanted, dtype=dtype, device=device)
        return kept.narrow(rows, 0, shape[rows])

    def __call__(self, tag: Hashable, function: Callable[..., Tensor], inputs: Inputs, buffer: str = "") -> Tensor:
        """function(**inputs).

        tag: stands for all that the function depends on besides its inputs. buffer: the name of the one that it uses.
        """
        if not self._capturing:
            return function(**inputs)
        shapes = tuple((name, x.shape, x.dtype) for name, x in inputs.items() if x is not None)
        key = (tag, buffer, shapes)
        step = self._graphs.get(key)
        if step is None:
            while len(self._graphs) >= self._limit:
                self._graphs.popitem(last=False)
            try:
                if self._pool is None:
                    self._pool = torch.cuda.graph_pool_handle()
                step = CapturedStep(function, inputs, self._pool)
            except RuntimeError as error:
                logger.warning("runner=%r: capturing failed, steps go on uncaptured: %s", self.name, error)
                self._capturing = False
                self._graphs.clear()
                return function(**inputs)
            self._graphs[key] = step
            self.captures += 1
        self._graphs.move_to_end(key)
        return step(inputs)
