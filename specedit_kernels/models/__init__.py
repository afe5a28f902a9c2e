# SPDX-License-Identifier: Apache-2.0
"""One file a model: what the engine cannot know of it, and its registration (engine/registry.py)."""
