# SPDX-License-Identifier: Apache-2.0
"""A config keeps what was given; the rest follows the quality, by whatever way a config is made."""

import pickle
from dataclasses import asdict, fields, replace

import pytest

from specedit_kernels import SpecEditConfig
from specedit_kernels.engine.config import BRACKET, GUIDED, QUALITIES

QUALITY_FIELDS = {name for values in (*QUALITIES.values(), *GUIDED.values()) for name in values} - {"stages", "preset"}


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("former", QUALITIES)
def test_replace_takes_the_other_qualitys_values(former, quality):
    config = replace(SpecEditConfig(quality=former, threshold=0.3), quality=quality)
    assert config == SpecEditConfig(quality=quality, threshold=0.3)
    for guided in (False, True):
        assert config.resolved(guided) == SpecEditConfig(quality=quality, threshold=0.3).resolved(guided)
    assert config.step_counts() == SpecEditConfig(quality=quality).step_counts()


def test_replace_of_the_steps():
    for steps in (dict(preset=9), dict(stages=(1, 2, 3))):
        config = SpecEditConfig(quality="fast", **steps)
        assert replace(SpecEditConfig(quality="fast"), **steps).resolved() == config.resolved()
        assert replace(config, preset=None, stages=None) == SpecEditConfig(quality="fast")
    config = replace(SpecEditConfig(quality="paper"), stages=(1, 2, 3))
    assert config.step_counts() == (1, 2, 3) and config.resolved().preset is None
    # what a quality gives with the full finish follows that
    config = replace(SpecEditConfig(), finish="full", unselected="coarse")
    assert config.resolved().kv_refresh == 1 and not config.resolved().lock_text
    assert replace(config, finish=None).resolved().kv_refresh == 2


def test_a_value_that_is_the_qualitys_own_counts_as_given():
    for name in QUALITY_FIELDS:
        for quality in ("fast", "best"):
            own = getattr(SpecEditConfig(quality=quality).resolved(), name)
            config = SpecEditConfig(quality=quality, **{name: own})
            assert getattr(config.resolved(guided=True), name) == own, name
            others = GUIDED[quality].items() - {(name, GUIDED[quality].get(name))}
            assert others <= asdict(config.resolved(guided=True)).items(), "fields that are not given are guidance's"
    config = replace(SpecEditConfig(quality="fast", kv_refresh=BRACKET), quality="balanced")
    assert config.resolved().kv_refresh == BRACKET


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("given", [{}, dict(preset=9), dict(stages=(1, 2, 3)), dict(finish="full")], ids=str)
@pytest.mark.parametrize("quality", QUALITIES)
def test_resolved(quality, given, guided):
    config = SpecEditConfig(quality=quality, **given)
    whole = config.resolved(guided)
    assert whole.resolved() == whole.resolved(guided=True) == whole
    assert not {name for name in QUALITY_FIELDS - {"mixed_from"} if getattr(whole, name) is None}
    assert (whole.stages is None) != (whole.preset is None)
    assert all(
        getattr(whole, f.name) == getattr(config, f.name) or getattr(config, f.name) is None for f in fields(whole)
    )
    for each in (config, whole):
        assert pickle.loads(pickle.dumps(each)) == each == eval(repr(each)) and hash(each) == hash(replace(each))
    if not guided:  # what a config says of itself is that of the run
        for total in (None, 5, 30):
            counts = config.step_counts(total)
            assert counts == whole.step_counts(total) and config.sigmas(counts) == whole.sigmas(counts)
            assert config.separate_steps(counts) == whole.separate_steps(counts)
        assert config.may_drift == whole.may_drift and config.resolved_threshold() == whole.resolved_threshold()
        assert config.draft_of_coarse_steps == whole.draft_of_coarse_steps
        assert config.resolved_relative() == whole.resolved_relative()


def test_wrong_values_are_refused_when_a_config_is_made():
    for wrong in (
        dict(preset=5), dict(solver="heun"), dict(draft="small"), dict(finish="half"), dict(kv_refresh=0),
        dict(coarse_refresh=0), dict(stages=(0, 0, 0)), dict(unselected="coarse", finish="full", kv_refresh=2),
        dict(stages=(1, 2, 0), finish="full"), dict(stages=(1, 2, 0), quality="paper"), dict(lock_text=1),
        dict(draft_guidance="no"),
    ):  # fmt: skip
        name = next(n for n in ("kv_refresh", *wrong) if n in wrong)
        with pytest.raises((ValueError, TypeError), match=f"^{name}: expected|^stages: finish='full' needs"):
            SpecEditConfig(**wrong)
        with pytest.raises((ValueError, TypeError)):
            replace(SpecEditConfig(), **wrong)
