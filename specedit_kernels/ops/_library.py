# SPDX-License-Identifier: Apache-2.0
"""The one way by which an op enters its namespace, and what holds of every op because of it: no gradients are lost, and
autograd is informed of in-place writes."""

import torch
from torch.autograd import forward_ad

from .. import _ops

NAMESPACE = _ops.add_op_namespace_prefix("").removesuffix("::")
# A fragment: another copy of the package may have opened the namespace in this process.
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

# Kernels read strides; Inductor must hand over the layout that eager mode would have.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_BACKENDS = (torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA)
_BELOW_AUTOGRAD = torch._C._after_ADInplaceOrView_keyset


def overload_of(name):
    """The overload of the op ``name``, whichever copy of the package defined it."""
    return getattr(_ops.ops, name).default


def _define(schema, fake):
    """Define ``schema``; return (name, whether this copy did it).

    Where another copy of the package has defined the same op in this process, that copy goes on serving it.
    """
    name = schema.partition("(")[0]
    if hasattr(_ops.ops, name):
        existing = overload_of(name)._schema
        if torch._C.parse_schema(_ops.add_op_namespace_prefix(schema)) != existing:
            raise ImportError(
                f"torch.ops.{NAMESPACE}.{name} is defined already, by another copy of the package, as {existing}; "
                f"give one of the two copies a namespace of its own ({_ops.__name__})"
            )
        return name, False
    LIBRARY.define(schema, tags=_TAGS)
    torch.library.register_fake(_ops.add_op_namespace_prefix(name), fake, lib=LIBRARY)
    return name, True


def register(schema, implementation, fake):
    """Define ``schema``, serve CPU and CUDA by ``implementation`` and tracing by ``fake``; return the overload."""
    name, new = _define(schema, fake)
    overload = overload_of(name)
    if not new:
        return overload
    written = tuple(
        (i, argument.name)
        for i, argument in enumerate(overload._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )

    def call(*args, **kwargs):
        for i, argument in written:
            _check_written(name, argument, args[i])
        result = implementation(*args, **kwargs)
        for i, _ in written:
            # Here, not at the key of autograd's views, which tensors under inference_mode do not pass.
            torch._C._increment_version((args[i],))
        return result

    # An op that writes nothing is called as it is: each layer costs host time in every layer of every step.
    call = call if written else implementation

    def autograd(keyset, *args, **kwargs):
        if torch._C._any_requires_grad(*args, **kwargs) and torch.is_grad_enabled():
            _refuse_gradients(overload, args, kwargs)
        if forward_ad._current_level >= 0 and forward_ad._is_fwd_grad_enabled():
            _refuse_tangents(overload, args, kwargs)
        if (keyset & _BELOW_AUTOGRAD).highestPriorityTypeId() in _BACKENDS:
            # Nothing stands between: a second way through the dispatcher would find `call`.
            return call(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    def batched(*_, **__):
        raise ValueError(f"{name}: expected plain tensors, got batched ones: the op has no rule for torch.func.vmap")

    for key in _BACKENDS:
        LIBRARY.impl(name, call, key.name)
    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
    LIBRARY.impl(name, batched, "FuncTorchBatched")
    return overload


def define_csrc(schema, fake):
    """Define an internal op whose CUDA kernel the compiled extension registers; return the overload.

    The schema stands here, once, so that the package is whole without the extension.
    """
    return overload_of(_define(schema, fake)[0])


def _check_written(op, name, tensor):
    """``tensor`` may be written: no two of its elements share memory, and its mode of autograd is this one's."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        # The type of error is that of PyTorch's own in-place ops.
        raise RuntimeError(
            f"{op}: {name}: expected a tensor that may be written here, got an inference tensor outside "
            "torch.inference_mode(); clone it first"
        )
    if tensor.is_contiguous():
        return
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1:
            if stride <= reach:
                raise ValueError(
                    f"{op}: {name}: expected a tensor whose elements do not overlap in memory (it is written), got "
                    f"shape {list(tensor.shape)} with strides {list(tensor.stride())}; clone it first"
                )
            reach += stride * (size - 1)


def _tensors(overload, args, kwargs):
    """(name, tensor) of the tensors among the arguments of a call."""
    given = dict(zip((argument.name for argument in overload._schema.arguments), args)) | kwargs
    return ((name, x) for name, x in given.items() if isinstance(x, torch.Tensor))


def _refuse_gradients(overload, args, kwargs):
    """Kernels have no backward: an input that needs one is refused, never silently detached."""
    for name, tensor in _tensors(overload, args, kwargs):
        if tensor.requires_grad:
            raise ValueError(
                f"{overload._opname}: {name}: expected a tensor that does not require grad (the op has no backward), "
                "got requires_grad=True; call it under torch.no_grad() or detach the tensor"
            )


def _refuse_tangents(overload, args, kwargs):
    for name, tensor in _tensors(overload, args, kwargs):
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(
                f"{overload._opname}: {name}: expected a tensor without a tangent (the op has no forward-mode "
                "gradient), got a dual tensor; detach it"
            )
