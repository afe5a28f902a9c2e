# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C on the command while it imports, which takes seconds: one line and exit code 130, as later.

The package imports torch before `cli.main` can catch anything, so this comes before it. It does nothing in a program
that is not the command.
"""

import os
import signal
import sys

INTERRUPTED = 130


def _stop(signum, frame):
    os.write(2, b"specedit: interrupted\n")
    os._exit(INTERRUPTED)


def _is_command():
    name = os.path.splitext(os.path.basename(sys.argv[0] if sys.argv else ""))[0]
    return name == "specedit" or (name == "-m" and "specedit_kernels.cli" in sys.orig_argv)


def watch():
    """End at once on Ctrl-C, if this program is the command."""
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def unwatch():
    """Ctrl-C is an exception again, which ends what it must: half-written files."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
