# SPDX-License-Identifier: Apache-2.0
"""The command: `specedit edit`, `mask`, `bench`, `ui` and `doctor`. A file a subcommand."""

from .main import main

__all__ = ["main"]
