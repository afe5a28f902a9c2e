# SPDX-License-Identifier: Apache-2.0
"""The error rule of every kernel test: no worse than the same formula in PyTorch at the same dtype."""

import torch

# Room beside the eager error, in rounding steps of the result's dtype at the oracle's largest value: one for the
# rounding of the output, one because the eager formula may be exact by luck (a single key, equal inputs).
STEPS = 2.0
# Sums of hundreds of fp32 terms differ by this much by their order alone.
ORDER = 2e-6


def assert_within_budget(result, oracle, eager, what="result", luck=1.0):
    """max |result - oracle| <= luck * max |eager - oracle| + 2 steps + ORDER.

    ``oracle`` is float64 on the same rounded inputs. ``luck`` > 1 is for inputs whose rounded scores decide the
    error: there two equally good orders of summation differ by a factor.
    """
    assert result.dtype == eager.dtype, f"{what}: {result.dtype}, expected {eager.dtype}"
    assert result.shape == oracle.shape == eager.shape, (what, result.shape, oracle.shape, eager.shape)
    step = torch.finfo(result.dtype).eps
    result, eager = result.double(), eager.double()
    infinite = oracle.isinf()
    assert torch.equal(result[infinite], oracle[infinite]), f"{what}: infinities differ"
    if bool(infinite.all()):
        return
    finite = ~infinite
    error = (result - oracle)[finite].abs()
    assert not error.isnan().any(), f"{what}: NaN in {int(error.isnan().sum())} of {error.numel()} places"
    eager_error = (eager - oracle)[finite].abs().nan_to_num(0).max()
    allowed = luck * eager_error + STEPS * step * oracle[finite].abs().max() + ORDER
    assert error.max() <= allowed, f"{what}: error {error.max():.3e}, allowed {allowed:.3e}"
