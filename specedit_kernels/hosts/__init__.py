# SPDX-License-Identifier: Apache-2.0
"""Other inference stacks, a folder or file each. A host's code imports that host; nothing imports a host's code, but
those that serve share _serving, which imports no host."""
