# SPDX-License-Identifier: Apache-2.0
"""The ops, as functions with their contracts. Importing this registers ``torch.ops.specedit.*``."""

from specedit_kernels.ops._backends import BACKENDS, backend_of, names
from specedit_kernels.ops._library import NAMESPACE
from specedit_kernels.ops.gather_tokens import gather_tokens
from specedit_kernels.ops.merge_attn import merge_attn
from specedit_kernels.ops.mixed_res_attn import mixed_res_attn, mixed_res_attn_scatter_
from specedit_kernels.ops.scatter_tokens import scatter_tokens_
from specedit_kernels.ops.select_tokens import select_tokens
from specedit_kernels.ops.token_discrepancy import token_discrepancy

__all__ = [
    "BACKENDS",
    "NAMESPACE",
    "backend_of",
    "gather_tokens",
    "merge_attn",
    "mixed_res_attn",
    "mixed_res_attn_scatter_",
    "names",
    "scatter_tokens_",
    "select_tokens",
    "token_discrepancy",
]
