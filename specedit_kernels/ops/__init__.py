# SPDX-License-Identifier: Apache-2.0
"""The ops, as functions with their contracts. Importing this registers ``torch.ops.specedit.*``."""

from specedit_kernels.ops._backends import BACKENDS, backend_of, names
from specedit_kernels.ops._library import NAMESPACE
from specedit_kernels.ops.adaln_modulate import adaln_modulate
from specedit_kernels.ops.gated_residual_add import gated_residual_add_
from specedit_kernels.ops.gather_tokens import gather_tokens
from specedit_kernels.ops.group_norm import group_norm
from specedit_kernels.ops.merge_attn import merge_attn
from specedit_kernels.ops.mixed_res_attn import mixed_res_attn, mixed_res_attn_scatter_
from specedit_kernels.ops.qk_norm_rope_scatter import qk_norm_rope_scatter_
from specedit_kernels.ops.scatter_tokens import scatter_tokens_
from specedit_kernels.ops.select_tokens import select_tokens
from specedit_kernels.ops.sparse_cross_attn import sparse_cross_attn
from specedit_kernels.ops.token_discrepancy import token_discrepancy

__all__ = [
    "BACKENDS",
    "NAMESPACE",
    "adaln_modulate",
    "backend_of",
    "gated_residual_add_",
    "gather_tokens",
    "group_norm",
    "merge_attn",
    "mixed_res_attn",
    "mixed_res_attn_scatter_",
    "names",
    "qk_norm_rope_scatter_",
    "scatter_tokens_",
    "select_tokens",
    "sparse_cross_attn",
    "token_discrepancy",
]
