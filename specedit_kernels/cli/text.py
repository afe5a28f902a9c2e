# SPDX-License-Identifier: Apache-2.0
"""What the command says: one line for a mistake, and text that any screen takes."""

from __future__ import annotations

import os
import sys
from typing import TextIO


class UserError(ValueError):
    """A mistake of the user's; its text is the one line that is shown."""


def one_line(text: str) -> str:
    """The text without line breaks and control characters."""
    return "".join(c if c.isprintable() or not c.isascii() else " " for c in str(text))


def say(text: str, stream: TextIO | None = None) -> None:
    """Print; what the stream cannot show is replaced, and one that is closed or full is passed over.

    The work is done when this is called: what becomes of the words must not become its end.
    """
    stream = sys.stdout if stream is None else stream
    if stream is None:  # closed before Python started
        return
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        stream.flush()
    except (OSError, ValueError):
        # Python flushes again at its end, and makes an exit code of its own of a second failure
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
        except (OSError, ValueError):
            pass
