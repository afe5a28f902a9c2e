# SPDX-License-Identifier: Apache-2.0
import torch

from ._precision import as_written


@as_written
def merge_attn(out_a, lse_a, out_b, lse_b):
    """out = (e^a out_a + e^b out_b) / (e^a + e^b), lse = log(e^a + e^b), shifted by the larger of the two."""
    top = torch.maximum(lse_a, lse_b)
    pivot = top.masked_fill(top == float("-inf"), 0)
    exp_a, exp_b = (lse_a - pivot).exp(), (lse_b - pivot).exp()
    total = exp_a + exp_b
    lse = pivot + total.log()

    def weighted(out, lse, exp):
        # A half without keys takes no part, whatever its rows hold: 0 * NaN is not 0.
        weight = exp / total.masked_fill(top == float("-inf"), 1)
        weight, empty = (x.transpose(-1, -2).unsqueeze(-1) for x in (weight, lse == float("-inf")))
        return (out.to(weight.dtype) * weight).masked_fill(empty & ~weight.isnan(), 0)

    out = weighted(out_a, lse_a, exp_a) + weighted(out_b, lse_b, exp_b)
    return out.to(out_a.dtype).contiguous(), lse.contiguous()
