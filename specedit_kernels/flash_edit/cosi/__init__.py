# SPDX-License-Identifier: Apache-2.0
"""COSI: training of a one-step generator and its cycle-consistent one-step inversion network (FlashEdit, arXiv
2509.22244), for any model that is registered.

Both are low-rank changes of an edit model's own transformer. `distil_loss` makes the generator from the model's
multi-step answers, `matching_loss` sharpens it; `inversion_loss` has both stages of the inversion network; `Loop` runs
any of them, resumably.
"""

from .loop import Loop
from .losses import (
    CosiWeights,
    answer_loss,
    distil_loss,
    inversion_loss,
    matching_loss,
    noise_loss,
    reconstruction_loss,
    teacher_loss,
    teacher_noise,
)

__all__ = [
    "CosiWeights",
    "Loop",
    "answer_loss",
    "distil_loss",
    "inversion_loss",
    "matching_loss",
    "noise_loss",
    "reconstruction_loss",
    "teacher_loss",
    "teacher_noise",
]
