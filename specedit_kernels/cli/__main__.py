# SPDX-License-Identifier: Apache-2.0
"""`python -m specedit_kernels.cli`."""

import sys

from .main import main

sys.exit(main())
