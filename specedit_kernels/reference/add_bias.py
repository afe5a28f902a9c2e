# SPDX-License-Identifier: Apache-2.0
from . import _maps
from ._precision import as_written


@as_written
def add_bias_(x, bias, residual, residual_bias):
    """x += bias, and residual + residual_bias where given, in fp32 (float64 stays float64), rounded once."""
    total = _maps.biased(x, bias)
    x.copy_(total if residual is None else total + _maps.biased(residual, residual_bias))
