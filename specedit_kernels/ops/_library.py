# SPDX-License-Identifier: Apache-2.0
"""The op namespace, and the one way by which an op enters it."""

import torch

NAMESPACE = "specedit"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

# Kernels read strides; Inductor must hand over the layout that eager mode would have.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def register(schema, implementation, fake):
    """Define ``schema``, serve CPU and CUDA by ``implementation`` and tracing by ``fake``; return the overload."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=_TAGS)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def define_csrc(schema, fake):
    """Define an internal op whose CUDA kernel the compiled extension registers; return the overload.

    The schema stands here, once, so that the package is whole without the extension.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=_TAGS)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
