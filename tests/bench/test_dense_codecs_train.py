"""Acceptance of the dense codecs: DiLoCo with them reaches the loss of fp32 DiLoCo."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from psyche.bench.convergence.large_batch import default_section
from psyche.bench.convergence.trial import CENTRE, Trial
from psyche.bench.convergence.trial_pool import run_all
from psyche.bench.harness.turns import percent_above
from psyche.data.prepare import prepare

LIMITS = {"int8": 0.2, "int4": 0.3}
"""In %, either way."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_dense_codecs_are_within_tenths_of_a_percent_of_fp32(tmp_path: Path) -> None:
    """At the start of training and with a low inner lr, where a pair shows the codec and not chaos.

    Measured here: −0.06 to +0.01 % for int8, −0.05 to +0.00 % for int4 and as much for parameters changed by a
    millionth. At the lr of the bench all differ from fp32 by up to 1.2 %: a bound on one pair would say nothing.
    """
    section = default_section(tmp_path)
    setting = replace(section.setting, inner=section.setting.inner.model_copy(update={"lr": 1e-3}))
    prepare(setting.data, setting.cache, vocab_limit=setting.model.vocab_size)
    one = Trial(system="diloco", codec="fp32", nodes=CENTRE, steps=320, outer=section.outer, inner_steps=10)
    fp32 = [replace(one, seed=seed) for seed in range(3)]
    coded = {name: [replace(trial, codec=name) for trial in fp32] for name in LIMITS}
    found = run_all(setting, [*fp32, *chain(*coded.values())], lambda trial, outcome: None)
    assert all(found[trial].heldout_loss < 5.0 for trial in fp32)  # ln 512 = 6.24: it has learned
    differences = {
        name: [
            percent_above(found[ours].heldout_loss, found[theirs].heldout_loss)
            for ours, theirs in zip(trials, fp32, strict=True)
        ]
        for name, trials in coded.items()
    }
    assert all(abs(one) < LIMITS[name] for name, of_seeds in differences.items() for one in of_seeds), differences
