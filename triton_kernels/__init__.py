# SPDX-License-Identifier: Apache-2.0
"""Triton kernels and their launchers, a file per op. Inputs arrive checked by ``specedit_kernels.ops``."""
