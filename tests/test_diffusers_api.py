# SPDX-License-Identifier: Apache-2.0
"""What `engine/_diffusers.py` relies on in diffusers, accelerate and torch beyond their documents: a line each.

An upgrade that changes one of them fails here first, by name.
"""

import ast
import inspect
from pathlib import Path

import accelerate.hooks
import pytest
import torch
from diffusers import (
    ContextParallelConfig,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
)
from diffusers.hooks import context_parallel, group_offloading, hooks
from tiny_models import tiny_pipeline

import specedit_kernels
from specedit_kernels.engine import _diffusers
from specedit_kernels.engine._diffusers import calculate_shift, retrieve_timesteps

PRIVATE = ("_execution_device", "_hf_hook", "_diffusers_hook", "_parallel_config", "_orig_mod", "_hook_order",
           "_compiled_call_impl", "_ulysses_mesh")  # fmt: skip


def relied_on():
    """{what is relied on: whether it holds}."""
    pipe = tiny_pipeline()
    layer = torch.nn.Linear(2, 2)
    hooked = accelerate.hooks.add_hook_to_module(torch.nn.Linear(2, 2), accelerate.hooks.ModelHook())
    freed = torch.nn.Linear(2, 2)
    accelerate.hooks.remove_hook_from_module(accelerate.hooks.add_hook_to_module(freed, accelerate.hooks.ModelHook()))
    grouped = torch.nn.Linear(2, 2)
    registry = hooks.HookRegistry.check_if_exists_or_initialize(grouped)
    registry.register_hook(hooks.ModelHook(), "one")
    return {
        "a pipeline says where it computes": pipe._execution_device == torch.device("cpu"),
        "accelerate keeps a module's hook in _hf_hook": isinstance(hooked._hf_hook, accelerate.hooks.ModelHook),
        "accelerate takes _hf_hook away again": not hasattr(freed, "_hf_hook"),
        "accelerate leaves the class's own forward on the object": freed.forward.__func__ is torch.nn.Linear.forward,
        "accelerate's hooks have pre_forward and post_forward": all(
            hasattr(accelerate.hooks.CpuOffload, n) for n in ("pre_forward", "post_forward")
        ),
        "diffusers keeps hooks by name in _diffusers_hook": list(grouped._diffusers_hook.hooks) == ["one"],
        "diffusers knows the order of hooks": grouped._diffusers_hook._hook_order == ["one"],
        "diffusers' hooks have pre_forward and post_forward": all(
            hasattr(hooks.ModelHook, n) for n in ("pre_forward", "post_forward")
        ),
        "hooks that answer for a forward have new_forward": not hasattr(hooks.ModelHook, "new_forward"),
        "the hook that learns the order of layers has its name": hasattr(
            group_offloading, "LazyPrefetchGroupOffloadingHook"
        ),
        "a parallelised transformer has _parallel_config": all(
            getattr(kind, "_parallel_config", 0) is None
            for kind in (FluxTransformer2DModel, QwenImageTransformer2DModel)
        ),
        "the hooks that share a sequence have their names": all(
            hasattr(context_parallel, n) for n in ("ContextParallelSplitHook", "ContextParallelGatherHook")
        ),
        "how a sequence is shared has these names": all(
            hasattr(ContextParallelConfig(ulysses_degree=2), n)
            for n in ("ring_degree", "ulysses_anything", "_ulysses_mesh")
        ),
        "torch.compile(module) keeps the module in _orig_mod": torch.compile(layer)._orig_mod is layer,
        "module.compile() keeps what is called in _compiled_call_impl": layer._compiled_call_impl is None,
        "modules are called by _wrapped_call_impl": torch.nn.Module.__call__ is torch.nn.Module._wrapped_call_impl,
        "torch has hooks for all modules": all(
            hasattr(torch.nn.modules.module, n) for n in ("_global_forward_hooks", "_global_forward_pre_hooks")
        ),
        "hooks of torch are in two dictionaries": layer._forward_hooks == layer._forward_pre_hooks == {},
        "the schedule's shift takes five numbers": list(inspect.signature(calculate_shift).parameters)[1:]
        == ["base_seq_len", "max_seq_len", "base_shift", "max_shift"],
        "timesteps are set from sigmas": "sigmas" in inspect.signature(retrieve_timesteps).parameters,
        "a Kontext pipeline has preferred sizes": hasattr(
            inspect.getmodule(FluxKontextPipeline), "PREFERRED_KONTEXT_RESOLUTIONS"
        ),
    }


RELIED_ON = relied_on()


@pytest.mark.parametrize("what", RELIED_ON)
def test_what_is_relied_on_holds(what):
    assert RELIED_ON[what]


def test_a_walk_finds_what_modules_finds_and_is_made_once_where_that_is_said():
    transformer = tiny_pipeline().transformer
    walked = _diffusers.each_module
    assert walked(transformer) == list(transformer.modules())
    with _diffusers.one_walk():
        first = walked(transformer)
        assert walked(transformer) is first and walked(transformer.norm_out) == list(transformer.norm_out.modules())
        with _diffusers.walking_anew():
            transformer.extra = torch.nn.Identity()
            assert walked(transformer) == list(transformer.modules()) != first
        again = walked(transformer)
        assert again == list(transformer.modules()) and walked(transformer) is again
        with _diffusers.one_walk():
            assert walked(transformer) is not again
        assert walked(transformer) is again
    with _diffusers.walking_anew():
        assert walked(transformer) is not walked(transformer)


def test_no_other_file_touches_what_is_not_documented():
    folder = Path(specedit_kernels.__file__).parent
    found = []
    for room in ("engine", "models", "flash_edit"):
        for path in (folder / room).rglob("*.py"):
            if path.name == Path(_diffusers.__file__).name:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                name = getattr(node, "attr", getattr(node, "value", None))
                own = path.name == "attention.py" and name == "_parallel_config"  # a processor's, handed on
                if isinstance(node, (ast.Attribute, ast.Constant)) and name in PRIVATE and not own:
                    found.append(f"{path.name}:{node.lineno} {name}")
    assert not found


FLOATS = ("zeros", "ones", "full", "rand", "randn", "empty", "tensor", "linspace", "eye", "normal", "scalar_tensor")


@pytest.mark.slow
def test_no_tensor_of_numbers_is_made_without_a_dtype():
    """torch.set_default_dtype is the user's: what a file makes by it has another type in his program."""
    folder, found = Path(specedit_kernels.__file__).parent, []
    for room in ("engine", "models", "flash_edit", "sampling"):
        for path in (folder / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                function = getattr(node, "func", None)
                made = getattr(function, "attr", "") in FLOATS and getattr(function.value, "id", "") == "torch"
                if made and not any(keyword.arg == "dtype" for keyword in node.keywords):
                    found.append(f"{path.name}:{node.lineno}")
    assert not found
