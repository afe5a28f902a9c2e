# SPDX-License-Identifier: Apache-2.0
"""How steps are launched: kernel by kernel, or as CUDA graphs that a few shapes share."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from . import fp8, low_rank, merged, registry
from ._diffusers import (
    ABOUT_FORWARD,
    bring_in,
    context_parallel,
    each_module,
    foreign_forward,
    global_hooks,
    hooked,
    is_cast,
    is_wrapper,
    moved_to,
    on_parallel,
    unwrapped,
    waits_for_host,
    without_context_parallel,
)
from .quantised import made

logger = logging.getLogger("specedit_kernels")

Inputs = Mapping[str, Tensor | None]

# Graphs kept at once. A run has one for each of its sequences (coarse, mixed, active, full) and one for each call of
# the autoencoder: 7, and 3 for another size of the region; with guidance whose branches run apart, and two references,
# 14, and 6. Fewer than one run has would be captured in every run. Beside the pool that all share, one takes its inputs
# (some 20 MB at 1024 x 1024) and what the driver keeps of it.
GRAPHS = 32
# Between the names of buffers, where a call uses several.
BESIDE = " + "
# Bytes: where a buffer begins. cudaMalloc's own alignment, more than any kernel's.
ALIGNMENT = 256


_PLAIN = (torch.nn.Parameter, Tensor)


class _Memory:
    """Addresses of weights: what captured graphs depend on."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.devices: set[torch.device] = set()
        self._seen: set[int] = set()

    def add(self, x: Any) -> None:
        """A weight: its own memory, that of the tensors a wrapper holds, and of what a quantised one has beside it."""
        if type(x) in _PLAIN:
            self.devices.add(x.device)
            self.found += (x.data_ptr(), x.dtype)
            return
        self.found.append(type(x))
        if is_wrapper(x):
            for name in x.__tensor_flatten__()[0]:
                self.add(getattr(x, name))
            return
        self.devices.add(x.device)
        self.found += (x.data_ptr(), x.dtype)
        self.add_held(vars(x))

    def add_held(self, value: Any) -> None:
        """Tensors anywhere in an object: a library's state of a quantised weight. Modules are looked at apart."""
        if isinstance(value, Tensor):
            self.add(value)
        elif isinstance(value, dict):
            for each in value.values():
                self.add_held(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                self.add_held(each)
        elif hasattr(value, "__dict__") and not isinstance(value, (torch.nn.Module, type)) and not callable(value):
            if id(value) not in self._seen:
                self._seen.add(id(value))
                self.add_held(vars(value))

    def add_scaling(self, scaling: Any) -> None:
        """The numbers that an adapter multiplies by; a graph reads those on the device at their address."""
        for name, value in scaling.items() if isinstance(scaling, dict) else [("", scaling)]:
            if isinstance(value, Tensor):
                value = value.data_ptr() if value.is_cuda else value.tolist()
            self.found.append((name, repr(value)))

    def add_module(self, module: torch.nn.Module) -> None:
        """All of one module, without its children."""
        own = module.__dict__
        found = self.found
        found.append(type(module))
        if not own["_parameters"] and not own["_buffers"] and "scaling" not in own:
            return
        quantised = False
        for kind in ("_parameters", "_buffers"):
            for x in own[kind].values():
                if x is None:
                    continue
                if type(x) in _PLAIN:  # `add` in place: a call for each weight takes longer than all else here
                    self.devices.add(x.device)
                    found += (x.data_ptr(), x.dtype)
                else:
                    quantised = True
                    self.add(x)
        if quantised:
            self.add_held({k: v for k, v in own.items() if not k.startswith("_")})
        if "scaling" in own:
            self.add_scaling(own["scaling"])
            active = (getattr(module, n, None) for n in ("active_adapters", "disable_adapters", "merged"))
            self.found.append(repr(tuple(active)))


def weight_signature(*modules: torch.nn.Module) -> list[Hashable]:
    """Addresses of these modules' weights, and the scales of adapters (PEFT): what a captured graph depends on."""
    memory = _Memory()
    for module in modules:
        for each in each_module(module):
            memory.add_module(each)
    return memory.found


def inspect(name: str, transformer: torch.nn.Module, vae: torch.nn.Module) -> tuple[str, list[Hashable]]:
    """(why the runner of that name cannot run these, or "", what its graphs depend on: `weight_signature`).

    One pass, since a run waits for it. Modules that the fused forward calls are called with their hooks and with a
    forward of their own; only a replay would leave these out. Of what is `moved_to` a device the place is known once it
    was brought in.
    """
    transformer, vae = unwrapped(transformer), unwrapped(vae)
    if context_parallel(transformer) is not None:
        if name == "compile":
            return "a transformer on several GPUs is not compiled: expected 'graph' or 'fused'", []
        transformer = without_context_parallel(transformer)
    elif on_parallel(transformer):
        return "the transformer is parallelised", []
    if global_hooks():
        return "torch has hooks for all modules, which it would leave out", []
    passed = set()
    for module, kind in registry.replaced_by(transformer):
        passed.add(module)
        if foreign_forward(module, kind) and not (module is transformer and moved_to(module)):
            return f"a {type(module).__name__} has a forward that is not its model's, which it would leave out", []
    memory, known, graphs = _Memory(), registry.own_pre_hooks() | low_rank.OWN_HOOKS, name != "fused"
    for part in (transformer, vae):
        device = moved_to(part)
        if device is not None:
            memory.devices.add(device)
        for module in each_module(part):
            own = module.__dict__  # a module looks for what it does not have for long
            called = part is transformer and module not in passed
            # a call for each of the thousands that have nothing of these would take longer than all else here
            about = own["_forward_pre_hooks"] or own["_forward_hooks"] or not ABOUT_FORWARD.isdisjoint(own)
            if about and (graphs or not called) and not (module is part and device):
                cast = False
                if hooked(own, known):
                    cast = called and is_cast(module, low_rank.OWN_HOOKS)
                    if not cast:
                        return f"a {type(module).__name__} has hooks (offloading, caches), which it would leave out", []
                if "forward" in own and not cast and foreign_forward(module):
                    return f"a {type(module).__name__} has a forward of its own, which it would leave out", []
            if graphs:
                weight = own["_parameters"].get("weight")
                if weight is not None and type(weight) is not torch.nn.Parameter:
                    reason = waits_for_host(module, name == "compile")
                    # what torch.compile compiles is called
                    if reason and not (called and name == "graph" and made(module)):
                        return reason, []
                if device is None:
                    memory.add_module(module)
    reason = ""
    if graphs and ({d.type for d in memory.devices} != {"cuda"} or len(memory.devices) > 1):
        reason = f"it needs one CUDA device, the weights are on {', '.join(sorted(map(str, memory.devices)))}"
    return reason, memory.found


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    # one for all captures: cuBLAS keeps a workspace for each stream that it has seen
    return torch.cuda.Stream(device)


def _layout(x: Tensor) -> torch.memory_format:
    """Memory format of a captured input: convolutions keep that of their input."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """On the stream of captures, between what was given to the current one before and what it is given after."""
    with torch.cuda.device(device):
        aside, current = _stream(device), torch.cuda.current_stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            yield aside
        current.wait_stream(aside)


def _first_call(function: Callable[..., Any], inputs: Inputs) -> Any:
    """function(**inputs) as it has to be called once before it is captured: kernels are compiled and libraries make
    their plans on their first call, some of them a stream's own."""
    device = next(x.device for x in inputs.values() if x is not None)
    with _aside(device):
        output = function(**inputs)
    tree_map(lambda x: x.record_stream(torch.cuda.current_stream(device)), output)
    return output


def _end_failed_capture(device: torch.device, pool: Any) -> None:
    """Undo what a failed capture leaves behind in torch (2.11 to 2.13): the allocator goes on filling the graph's pool,
    which it never frees since the graph does not give it back, and the device's random generator raises at every later
    use, the user's too."""
    with contextlib.suppress(RuntimeError):  # it did end
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    # the end of a capture that succeeds is what resets the generator
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=_stream(device), capture_error_mode="thread_local"):
        torch.zeros(1, dtype=torch.float32, device=device)


class CapturedStep:
    """One call of a function of tensors as a CUDA graph, replayed over new contents of the same shapes.

    called: whether `_first_call` was made with inputs of these shapes.
    """

    def __init__(self, function: Callable[..., Any], inputs: Inputs, pool: Any, called: bool = False):
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
        if not called:
            _first_call(function, self.inputs)
        with torch.cuda.device(device):
            self.graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self.graph, pool=pool, stream=_stream(device), capture_error_mode="thread_local"):
                    before = torch.cuda.memory_reserved()
                    self.output = function(**self.inputs)
                    self.pool_bytes = torch.cuda.memory_reserved() - before
            except Exception:
                _end_failed_capture(device, pool)
                raise
        self.input_bytes = sum(x.numel() * x.element_size() for x in self.inputs.values() if x is not None)

    def _fill(self, inputs: Inputs) -> None:
        for name, x in inputs.items():
            if x is not None:
                kept = self.inputs[name]
                assert kept is not None
                kept.copy_(x)

    def __call__(self, inputs: Inputs) -> Any:
        self._fill(inputs)
        self.graph.replay()
        # the next replay writes over the output
        return tree_map(torch.clone, self.output)


class StepRunner:
    """Calls functions of tensors, and keeps what outlives a call: graphs, buffers of keys and values, copies of
    weights in fp8 or with a low-rank change in them.

    name: "fused" calls them; "graph" and "compile" capture each call as a CUDA graph when its tag and shapes are new,
    and replay it from then on. At most `graphs` are kept, the one longest unused goes first; all share one pool of
    memory. A capture that fails ends capturing for good, with a warning: calls go on uncaptured.
    moving: a hook brings the transformer or the autoencoder in as a whole, and another one sends it away: a graph then
    lives for a part of a run, and a call is captured at its second time.
    """

    def __init__(self, name: str, graphs: int = GRAPHS):
        self.name = name
        self.captures = 0
        self._limit = graphs
        self._capturing = name != "fused"
        self.failure = ""  # why it stopped capturing
        self._graphs: OrderedDict[tuple[Any, ...], CapturedStep] = OrderedDict()
        self._pool: Any = None
        self._pool_bytes = 0
        self._buffers: dict[tuple[str, torch.device], list[Tensor]] = {}
        self._laid: dict[str, Hashable] = {}
        self._signature: list[Hashable] | None = None
        self.moving = False
        self._called: set[Hashable] = set()
        self._undo: weakref.finalize | None = None
        self.linears = fp8.Fp8Linears()
        self.merged = merged.MergedLinears()

    def __deepcopy__(self, memo: dict[int, Any]) -> StepRunner:
        """An empty one: what is kept belongs to weights where they lie, and a copied model's lie elsewhere."""
        return StepRunner(self.name, self._limit)

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
        return sum(x.nbytes for chunks in self._buffers.values() for x in chunks)

    def watches(self, signature: list[Hashable]) -> bool:
        """Whether weights have the addresses of the last call; never, where the signature has no addresses."""
        return bool(signature) and signature == self._signature

    def watch(self, signature: list[Hashable]) -> None:
        """Forget all where it is not what it was at the last call."""
        if signature != self._signature or self.linears.stale() or self.merged.stale():
            self.clear()
        self._signature = signature

    def bring(self, transformer: torch.nn.Module) -> None:
        """Bring a transformer that is moved to where it computes. Graphs over its former memory are forgotten; not the
        buffers, which the run at hand uses."""
        if not self.moving:
            return
        bring_in(transformer)
        signature = weight_signature(transformer)
        if signature != self._signature:
            self._forget_graphs()
        self._signature = signature

    def begin_moving(self) -> None:
        """A run of weights that are moved begins: what the last one made of them is forgotten, since they may have been
        written to where they lay meanwhile."""
        self._forget_graphs()
        self._forget_copies()

    def _forget_copies(self) -> None:
        self.linears.clear()
        self.merged.clear()

    def _forget_graphs(self) -> None:
        self._drop(list(self._graphs))
        self._called.clear()

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
        """Free the graphs and their pool, the buffers, and copies of weights."""
        self._forget_graphs()
        self._buffers.clear()
        self._laid.clear()
        self._forget_copies()

    def _drop(self, keys: Sequence[tuple[Any, ...]]) -> None:
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
        """`count` tensors of that shape, not cleared: the same memory at each such call.

        Those of other shapes and dtypes of this name lie over them, in chunks of memory that never move: where the last
        ones were too small another chunk is added, and graphs over them stay. So there is as much memory as the largest
        need so far, and what lies in it lasts until the next call of another shape. With "compile" each has a chunk of
        its own: torch.compile (2.11 to 2.13) gives views of one storage wrong shapes where a block writes to them.
        """
        chunks = self._buffers.setdefault((name, device), [])
        size = math.prod(shape)
        step = -(-size * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        most = 1 if self.name == "compile" else count  # tensors of a chunk
        missing = count - sum(min(x.nbytes // step, most) for x in chunks)
        with torch.inference_mode(False):
            if missing > 0:
                # of this dtype, since it begins as a tensor of it would
                together = min(missing, most)
                length = together * step // dtype.itemsize
                chunks += [torch.empty(length, dtype=dtype, device=device) for _ in range(missing // together)]
            # from the first chunk on, so that one more moves none of them
            step //= dtype.itemsize
            typed = (x.view(dtype) for x in chunks)
            places = ((x, at) for x in typed for at in range(0, x.numel() - step + 1, step)[:most])
            found = [x[at : at + size].view(shape) for x, at in itertools.islice(places, count)]
        self._laid[name] = count, shape, dtype
        return found

    def __call__(self, tag: Hashable, function: Callable[..., Any], inputs: Inputs, buffers: str = "") -> Any:
        """function(**inputs).

        tag: stands for all that the function depends on besides its inputs. buffers: the name of those that it uses, or
        several with BESIDE between.
        """
        if not self._capturing:
            return function(**inputs)
        shapes = tuple((name, x.shape, x.dtype, _layout(x)) for name, x in inputs.items() if x is not None)
        laid = tuple(self._laid.get(name) for name in buffers.split(BESIDE))
        key = (tag, buffers, laid, shapes, low_rank.active_serial(), fp8.active_for(), merged.now() is not None)
        step = self._graphs.get(key)
        if step is None:
            try:
                if self.moving and key not in self._called:
                    self._called.add(key)
                    return _first_call(function, inputs)
                if self._pool is None:
                    self._pool = torch.cuda.graph_pool_handle()
                step = CapturedStep(function, inputs, self._pool, self.moving)
            except RuntimeError as error:
                self.failure = f"capturing failed: {str(error).partition(chr(10))[0]}"
                logger.warning("runner=%r: steps go on uncaptured: capturing failed: %s", self.name, error)
                self._capturing = False
                self._drop(list(self._graphs))
                return function(**inputs)
            self._graphs[key] = step
            self._pool_bytes += step.pool_bytes
            self.captures += 1
            self._drop(list(self._graphs)[: -self._limit])
        self._graphs.move_to_end(key)
        return step(inputs)
