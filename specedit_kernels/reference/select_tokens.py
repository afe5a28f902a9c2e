# SPDX-License-Identifier: Apache-2.0
import torch

from ._precision import as_written


@as_written
def select_tokens(score, grid_h, grid_w, threshold, dilation, uniform_stride):
    """SpecEdit eqs. 7, 9, 10: threshold, grow by a square, add the uniform tokens, order selected tokens first."""
    score = score.float()
    chosen = ~(score <= torch.tensor(threshold, dtype=torch.float32, device=score.device))
    mask = chosen.view(-1, 1, grid_h, grid_w)
    if dilation and mask.numel():
        mask = torch.nn.functional.max_pool2d(mask.float(), 2 * dilation + 1, stride=1, padding=dilation) > 0
    if uniform_stride:
        mask = mask.clone()
        mask[:, :, ::uniform_stride, ::uniform_stride] = True
    mask = mask.reshape(score.shape)
    index = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True).to(torch.int32)
    return mask.contiguous(), index, mask.sum(1, dtype=torch.int32)
