# SPDX-License-Identifier: Apache-2.0
"""The plain PyTorch definition of each op: its CPU implementation and, in float64, the oracle of its tests."""
