# SPDX-License-Identifier: Apache-2.0
"""The command: `specedit edit`, `specedit mask`, `specedit doctor`. A file a subcommand."""

from .main import main

__all__ = ["main"]
