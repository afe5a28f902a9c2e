# SPDX-License-Identifier: Apache-2.0
import torch

from ._precision import as_written


@as_written
def token_discrepancy(draft, source, grid_h, grid_w):
    """SpecEdit eq. 6, one layer; in fp32, or in float64 for float64 inputs."""
    channel = 1 if draft.dim() == 4 else 2

    def unit(x):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x / torch.linalg.vector_norm(x, dim=channel, keepdim=True).clamp_min(1e-6)

    distance = (unit(draft) - unit(source)).square_().sum(channel)
    if draft.dim() == 4:
        distance = distance.unflatten(2, (grid_w, -1)).unflatten(1, (grid_h, -1)).mean((2, 4)).flatten(1)
    return distance.contiguous()
