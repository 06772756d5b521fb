"""The JSON keys of every measurement: programs read them, so they may be added to but not renamed or removed."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from psyche.bench.codec.passes import CodecRow
from psyche.bench.convergence.codec_loss import CurveRow
from psyche.bench.convergence.large_batch import LargeBatchRow
from psyche.bench.convergence.overlap_loss import OverlapRow
from psyche.bench.convergence.private_corpora import FederatedRow
from psyche.bench.convergence.unequal_steps import UnequalRow
from psyche.bench.corpus_speed import PreparedRow, ReadingRow
from psyche.bench.engine_speed import EngineRow
from psyche.bench.exchange.exchange_speed import ExchangeRow
from psyche.bench.gpu.training import Speed
from psyche.bench.harness.rows import Row
from psyche.bench.joining import JoinRow
from psyche.bench.mixed_speeds import MixedRow
from psyche.bench.utilisation import UtilisationRow

KEYS: dict[str, list[str]] = json.loads(Path(__file__).with_name("json_keys.json").read_text())
ROWS: dict[str, type[Row]] = {
    "convergence": LargeBatchRow,
    "convergence --codecs": CurveRow,
    "convergence --overlap": OverlapRow,
    "convergence --federated": FederatedRow,
    "mixed --loss": UnequalRow,
    "mixed": MixedRow,
    "utilisation": UtilisationRow,
    "join": JoinRow,
    "engine": EngineRow,
    "exchange": ExchangeRow,
    "codec": CodecRow,
    "data: preparing": PreparedRow,
    "data: reading": ReadingRow,
}


@pytest.mark.parametrize("command", ROWS)
def test_no_key_is_lost(command: str) -> None:
    assert set(KEYS[command]) <= set(ROWS[command].__struct_encode_fields__)


def test_no_key_of_the_gpu_check_is_lost() -> None:
    assert set(KEYS["gpu_check: training"]) <= {*(field.name for field in fields(Speed)), "tokens_per_second"}


def test_every_measurement_has_its_keys_recorded() -> None:
    assert set(KEYS) == {*ROWS, "gpu_check: training"}
