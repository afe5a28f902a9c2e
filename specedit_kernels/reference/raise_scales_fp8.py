# SPDX-License-Identifier: Apache-2.0
import math

import torch

from ._precision import as_written

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


@as_written
def raise_scales_fp8_(q_scale, k_scale, v_scale, v, q_weight, k_weight, headroom):
    """Each scale at least a 448th of the largest number that it is for. `maximum` and the norms pass NaN on."""
    for scale, weight in ((q_scale, q_weight), (k_scale, k_weight)):
        top = scale.new_ones(()) if weight is None else torch.linalg.vector_norm(weight.float(), float("inf"))
        scale.copy_(torch.maximum(scale, top * (math.sqrt(v.shape[-1]) / _LARGEST)))
    if v.shape[1]:
        top = torch.linalg.vector_norm(v.float(), float("inf"), dim=(1, 3))[:, None]
        v_scale.copy_(torch.maximum(v_scale, top * (headroom / _LARGEST)))
