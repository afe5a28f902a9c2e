# SPDX-License-Identifier: Apache-2.0
"""One step of the online softmax (Dao et al., arXiv 2205.14135, algorithm 1), right for scores of any size.

The running maximum is subtracted before the scores get their unit. Were it the other way round, one fused multiply-add
would do both, but of a score of 1e9 it would leave what rounding took off the maximum, up to 64, and 2^64 is infinite
in fp16. A difference of two fp32 numbers is never above 0 where the second is the larger: weights are 1 at most. For
the same reason a score may not come as a bare product, which the compiler would fuse with the subtraction.
"""

import triton
import triton.language as tl


@triton.jit
def softmax_step(score, valid, unit, total, top):
    """Weights of one tile of scores [M, N]; returns (weights, what the rows before are multiplied with, total, top).

    valid: None or [N], whether there is a key; unit: > 0, what makes the scores powers of two; total and top [M]: the
    sum of the weights and the largest score so far, 0 and -inf at the start.
    """
    if valid is not None:
        score = tl.where(valid[None, :], score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    # A row that has met no key yet has top -inf, and -inf - -inf is NaN: keep what is subtracted finite.
    pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2((score - pivot[:, None]) * unit)
    kept = tl.exp2((top - pivot) * unit)
    if valid is not None:
        # Also where the unit is 0, and -inf * 0 NaN.
        weight = tl.where(valid[None, :], weight, 0.0)
    kept = tl.where(top == float("-inf"), 0.0, kept)
    return weight, kept, total * kept + tl.sum(weight, 1), new_top
