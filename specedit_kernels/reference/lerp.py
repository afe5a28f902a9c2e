# SPDX-License-Identifier: Apache-2.0
import torch

from ._precision import as_written


@as_written
def lerp_(out, a, b, weight):
    """out = a + weight (b - a) in fp32."""
    out.copy_(torch.lerp(a.float(), b.float(), weight))
