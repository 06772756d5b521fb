"""The acceptance of the int8 codec: DiLoCo trained with it ends where fp32 DiLoCo ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from psyche.bench.plan import CENTRE, default_scale
from psyche.bench.pool import run_all
from psyche.bench.table import percent
from psyche.bench.trials import Trial
from psyche.data.prepare import prepare


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_int8_is_within_a_fifth_of_a_percent_of_fp32(tmp_path: Path) -> None:
    """A quarter of the default bench's steps, four seeds: rounding alone moves a single pair by about that much."""
    scale = default_scale(tmp_path)
    setting = scale.setting
    prepare(setting.data, setting.cache, vocab_limit=setting.model.vocab_size)
    one = Trial(
        system="diloco",
        codec="fp32",
        nodes=CENTRE,
        steps=scale.steps // 4,
        outer=scale.outer,
        inner_steps=scale.inner_steps,
    )
    fp32 = [replace(one, seed=seed) for seed in range(4)]
    int8 = [replace(trial, codec="int8") for trial in fp32]
    found = run_all(setting, fp32 + int8, lambda trial, outcome: None)
    pairs = zip(int8, fp32, strict=True)
    differences = [percent(found[ours].heldout_loss, found[theirs].heldout_loss) for ours, theirs in pairs]
    assert abs(fmean(differences)) < 0.2, differences
