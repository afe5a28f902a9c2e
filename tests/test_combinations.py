# SPDX-License-Identifier: Apache-2.0
import itertools
from collections import Counter

import combinations
import pytest


@pytest.fixture(params=[False, True], ids=["part", "all"])
def whole(request, monkeypatch):
    monkeypatch.setattr(combinations, "ALL", request.param)
    return request.param


@pytest.mark.parametrize("first", range(6))
def test_each_case_has_two_values_and_each_value_many_cases(whole, first):
    cases, values = range(37), (-1, 0, 1, 4)
    found = combinations.rotating(cases, values, first)
    assert len(set(found)) == len(found)
    assert set(Counter(case for case, _ in found).values()) == {4 if whole else 2}
    assert set(Counter(value for _, value in found)) == set(values)
    assert min(Counter(value for _, value in found).values()) >= (37 if whole else 18)


def test_each_two_values_meet(whole):
    axes = ("abcd", (1, 2, 3), (True, False), (None, 0.5))
    found = combinations.pairwise(*axes)
    assert len(set(found)) == len(found) == 48 if whole else 12 <= len(found) <= 16
    for i, j in itertools.combinations(range(4), 2):
        assert {(row[i], row[j]) for row in found} == set(itertools.product(axes[i], axes[j]))
