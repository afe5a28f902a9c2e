# SPDX-License-Identifier: Apache-2.0
"""Combinations of a test's parameters: some of them, or all where SPECEDIT_TEST_ALL=1 is set (`make test-full`)."""

import itertools
import os

ALL = os.environ.get("SPECEDIT_TEST_ALL", "0") not in ("", "0")


def rotating(cases, values, first=0):
    """[(case, value)]: two values for each case, another pair of them from case to case, so that each value meets its
    share of the cases. All combinations with SPECEDIT_TEST_ALL=1."""
    if ALL:
        return list(itertools.product(cases, values))
    pairs = list(itertools.combinations(values, 2))
    # a pair, then the one that shares no value with it
    pairs = [pair for i in range((len(pairs) + 1) // 2) for pair in dict.fromkeys((pairs[i], pairs[-1 - i]))]
    return [(case, value) for i, case in enumerate(cases) for value in pairs[(i + first) % len(pairs)]]


def in_turn(cases, values):
    """[(case, value)]: one value for each case, from case to case the next one. All combinations with
    SPECEDIT_TEST_ALL=1."""
    if ALL:
        return list(itertools.product(cases, values))
    return list(zip(cases, itertools.cycle(values)))


def first_of_each(cases, kind):
    """The first of the cases of each kind(case); all with SPECEDIT_TEST_ALL=1."""
    return cases if ALL else list({kind(case): case for case in reversed(cases)}.values())[::-1]


def pairwise(*axes):
    """Tuples of one value an axis, so few that each two values of two axes meet once or a little more often. All
    combinations with SPECEDIT_TEST_ALL=1."""
    rows = list(itertools.product(*(range(len(axis)) for axis in axes)))
    if not ALL:
        meetings = {row: frozenset(itertools.combinations(enumerate(row), 2)) for row in rows}
        missing, kept = set().union(*meetings.values()), []
        while missing:
            kept.append(max(rows, key=lambda row: len(meetings[row] & missing)))
            missing -= meetings[kept[-1]]
        rows = sorted(kept)
    return [tuple(axis[i] for axis, i in zip(axes, row, strict=True)) for row in rows]
