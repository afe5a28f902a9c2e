# SPDX-License-Identifier: Apache-2.0
"""COSI: training of a one-step generator and its cycle-consistent one-step inversion network (FlashEdit, arXiv
2509.22244), for any model that has an adapter in specedit_kernels.pipelines.

Both are low-rank changes of an edit model's own transformer. `distil_loss` makes the generator from the model's
multi-step answers; `inversion_loss` has both stages of the inversion network; `Loop` runs either, resumably.
"""

from .loop import Loop
from .losses import (
    CosiWeights,
    distil_loss,
    inversion_loss,
    noise_loss,
    reconstruction_loss,
    teacher_loss,
    teacher_noise,
)

__all__ = [
    "CosiWeights",
    "Loop",
    "distil_loss",
    "inversion_loss",
    "noise_loss",
    "reconstruction_loss",
    "teacher_loss",
    "teacher_noise",
]
