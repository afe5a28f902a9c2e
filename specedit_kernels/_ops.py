# SPDX-License-Identifier: Apache-2.0
"""The op namespace: the one place that names it.

A build that ships this package under another namespace, beside an installed one, replaces this file by one with the
same two names. setup.py builds the CUDA extension for the namespace that this file names.
"""

import torch

ops = torch.ops.specedit


def add_op_namespace_prefix(name):
    """The qualified name of an op, as torch.library takes it."""
    return f"specedit::{name}"
