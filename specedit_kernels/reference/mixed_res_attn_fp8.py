# SPDX-License-Identifier: Apache-2.0
import torch

from .._panels import of_panels
from .mixed_res_attn import mixed_res_attn


def dequantised(q, k, v, q_scale, k_scale, v_scale, dtype):
    """q, k and v [B, S, H, D] as numbers of `dtype`; v may be in panels."""
    v = of_panels(v, k.shape[1]) if v.dim() == 5 else v
    return (x.to(dtype) * scale.to(dtype)[..., None] for x, scale in ((q, q_scale), (k, k_scale), (v, v_scale)))


def mixed_res_attn_fp8(
    q, k, v, q_scale, k_scale, v_scale, key_bias, q_index, kv_index, q_lens, kv_lens, scale
):  # fmt: skip
    """`mixed_res_attn` in fp32 of what the e4m3 numbers and their scales stand for, in bf16."""
    numbers = dequantised(q, k, v, q_scale, k_scale, v_scale, torch.float32)
    out, lse = mixed_res_attn(*numbers, key_bias, q_index, kv_index, q_lens, kv_lens, None, None, None, None, scale)
    return out.to(torch.bfloat16), lse
