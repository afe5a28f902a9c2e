# SPDX-License-Identifier: Apache-2.0
"""The stages of an edit, the mixed sequence and its attention, caches and runners. Names no model."""
