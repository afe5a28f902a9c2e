# SPDX-License-Identifier: Apache-2.0
"""Pictures as arrays: alignment of an edit with its source, compositing at the source's size. No model, no pipeline."""
