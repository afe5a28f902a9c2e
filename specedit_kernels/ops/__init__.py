# SPDX-License-Identifier: Apache-2.0
"""The ops, as functions with their contracts. Importing this registers ``torch.ops.specedit.*``."""

from .. import _ops
from ._backends import BACKENDS, backend_of, names
from ._library import NAMESPACE
from .adaln_modulate import adaln_modulate
from .add_bias import add_bias_
from .channel_rms_norm import channel_rms_norm
from .dequantize import dequantize
from .dequantize_gguf import dequantize_gguf
from .gated_residual_add import gated_residual_add_
from .gather_tokens import gather_tokens
from .group_norm import group_norm, group_norm_statistics
from .lerp import lerp_
from .lerp_fp8 import lerp_fp8_
from .merge_attn import merge_attn
from .mixed_res_attn import mixed_res_attn, mixed_res_attn_scatter_
from .mixed_res_attn_fp8 import mixed_res_attn_fp8
from .qk_norm_rope_scatter import qk_norm_rope_scatter_, qk_norm_rope_scatter_fp8_
from .quantize_fp8 import quantize_fp8
from .raise_scales_fp8 import raise_scales_fp8_
from .scaled_softmax import scaled_softmax
from .scatter_tokens import scatter_tokens_
from .select_tokens import select_tokens
from .sparse_cross_attn import sparse_cross_attn
from .token_discrepancy import token_discrepancy

__all__ = [
    "BACKENDS",
    "NAMESPACE",
    "adaln_modulate",
    "add_bias_",
    "backend_of",
    "channel_rms_norm",
    "dequantize",
    "dequantize_gguf",
    "gated_residual_add_",
    "gather_tokens",
    "group_norm",
    "group_norm_statistics",
    "lerp_",
    "lerp_fp8_",
    "merge_attn",
    "mixed_res_attn",
    "mixed_res_attn_fp8",
    "mixed_res_attn_scatter_",
    "names",
    "qk_norm_rope_scatter_",
    "qk_norm_rope_scatter_fp8_",
    "quantize_fp8",
    "raise_scales_fp8_",
    "scaled_softmax",
    "scatter_tokens_",
    "select_tokens",
    "sparse_cross_attn",
    "token_discrepancy",
]

for _name in names():
    # help() of the op itself says the contract too.
    getattr(_ops.ops, _name).__doc__ = globals()[_name].__doc__
