# SPDX-License-Identifier: Apache-2.0
import torch

from ._precision import as_written


@as_written
def scaled_softmax(x, scale, dtype):
    """softmax(x * scale) over the last dimension, in fp32 (float64 stays float64), rounded once, to dtype."""
    return torch.softmax(x.to(torch.promote_types(x.dtype, torch.float32)) * scale, dim=-1).to(dtype)
