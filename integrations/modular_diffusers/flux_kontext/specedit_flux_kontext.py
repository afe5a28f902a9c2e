# SPDX-License-Identifier: Apache-2.0
"""The block map that modular_config.json names; the package has the code."""

from specedit_kernels.hosts.modular_diffusers import SpecEditFluxKontextBlocks

__all__ = ["SpecEditFluxKontextBlocks"]
