"""Sections small enough for a test: some thousand parameters, two rounds, 40 documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from psyche.bench.convergence import section as section_module
from psyche.bench.convergence.large_batch import LargeBatch
from psyche.bench.convergence.trial import Outcome, Setting, Trial, run_trial
from psyche.config import BpeTokenizer, Data, Inner, Model, Outer
from psyche.data.prepare import prepare


@pytest.fixture(scope="session")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    size = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    tiny = Setting(
        model=Model(settings=size | heads),
        data=Data(tokenizer=BpeTokenizer(vocab_size=300), sequence_length=32, max_documents=40, heldout_fraction=0.1),
        inner=Inner(lr=4e-3, batch_size=2),
        warmup=0.25,
        heldout_sequences=70,
        cache=tmp_path_factory.mktemp("cache"),
    )
    prepare(tiny.data, tiny.cache, vocab_limit=300)
    return tiny


@pytest.fixture(scope="session")
def large_batch(setting: Setting) -> LargeBatch:
    """A section with every table, for two and four nodes."""
    return LargeBatch(
        setting=setting,
        steps=8,
        inner_steps=4,
        outer=Outer(lr=0.7, momentum=0.5),
        seeds=(0,),
        lrs=(0.7,),
        momenta=(0.5, 0.9),
        other_inner_steps=(2,),
        inner_lrs=(4e-3,),
        nodes=(2, 4),
    )


@pytest.fixture(scope="session", autouse=True)
def in_this_process() -> Iterator[None]:
    """Run trials in this process: starting others would take longer than the trials."""

    def run_all(setting: Setting, trials: Iterable[Trial], done) -> dict[Trial, Outcome]:  # type: ignore[no-untyped-def]
        outcomes = {trial: run_trial(setting, trial) for trial in trials}
        for trial, outcome in outcomes.items():
            done(trial, outcome)
        return outcomes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(section_module, "run_all", run_all)
        yield
