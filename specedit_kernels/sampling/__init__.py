# SPDX-License-Identifier: Apache-2.0
"""Token layout, noise algebra, schedules and FLOP counts: pure functions that know no model."""
