"""Load, evaluate, sample and export trained models."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import log
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from psyche.cli import app
from psyche.config import MANIFEST, load_config
from psyche.data.prepare import prepare
from psyche.diloco.checkpoint import Checkpoint, save
from psyche.diloco.launch import Launch, launch
from psyche.durable import write_durably
from psyche.errors import PsycheError
from psyche.protocol.acceptor import Chain
from psyche.tools.evaluate import heldout_loss, task_scores, text_loss
from psyche.tools.generate import Sampling, generate
from psyche.tools.load import Trained, export_node, load_trained
from tests.protocol.one_leader import peer_id
from tests.tiny import write_config

ROUND = 3


@dataclass(frozen=True)
class Place:
    node: Path
    exported: Path
    cache: Path
    launched: Launch


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A node with a checkpoint, and its export."""
    folder = tmp_path_factory.mktemp("trained")
    config = load_config(write_config(folder, members=1))
    launched = launch(config, peer_id(0))
    node = folder / "node"
    node.mkdir()
    write_durably(node / MANIFEST, launched.manifest.encode())
    chain = Chain(ROUND, bytes(32), launched.genesis.index().root, 0)
    checkpoint = Checkpoint(launched.manifest.run_id, chain, launched.genesis.tensor, None, {}, ())
    save(checkpoint, node / "checkpoints", keep=1)
    assert export_node(node, folder / "model", config.node.cache) == ROUND
    return Place(node, folder / "model", config.node.cache, launched)


@pytest.fixture(scope="module")
def trained(place: Place) -> Trained:
    return load_trained(place.node, "cpu", place.cache)


def test_a_checkpoint_is_the_model_that_was_launched(place: Place, trained: Trained) -> None:
    """The launch and ``psyche eval`` find the same loss of the initial parameters on the held-out sequences."""
    assert trained.name == f"tiny after round {ROUND}"
    total, tokens = place.launched.heldout
    found = heldout_loss(trained, None)
    assert found.tokens == tokens
    assert found.nats == pytest.approx(total, rel=1e-4)
    assert found.loss == pytest.approx(log(512), rel=0.1), "it has learned nothing yet"
    said: list[tuple[int, int]] = []
    whole = heldout_loss(trained, 10**9, lambda done, total: said.append((done, total)))
    assert whole.tokens > found.tokens
    assert said[-1][0] == said[-1][1] == len(place.launched.store.heldout)


def test_evaluation_uses_the_sequences_of_every_node_and_names_missing_ones(
    place: Place, trained: Trained, tmp_path: Path
) -> None:
    """A node has only the held-out shards that the run evaluates on."""
    store = prepare(place.launched.manifest.run.data, tmp_path, vocab_limit=512, shard_bytes=1024)
    first, *others = store.heldout.shards
    for shard in others:
        store.path_of(shard).unlink()
    partial = replace(trained, store=store)
    assert heldout_loss(partial, None) == heldout_loss(trained, None)
    assert heldout_loss(partial, first.sequences).tokens == first.sequences * 31
    with pytest.raises(PsycheError, match=r"does not have all of 1\d* held-out sequences .*leave out --sequences"):
        heldout_loss(partial, first.sequences + 1)


def test_an_export_is_the_same_model(place: Place, trained: Trained, tmp_path: Path) -> None:
    exported = load_trained(place.exported, "cpu")
    text = tmp_path / "text"
    text.write_text("def évaluer(self):\n    return 0\n" * 40)
    one, other = text_loss(trained, text), text_loss(exported, text)
    assert exported.window == 2 * trained.window
    assert other.loss == pytest.approx(one.loss, rel=0.02)
    ids = exported.tokenizer("import os", return_tensors="pt")["input_ids"]
    assert torch.equal(exported.model(input_ids=ids).logits, trained.model(input_ids=ids).logits)
    assert heldout_loss(trained, 2).tokens == 2 * 31
    with pytest.raises(PsycheError, match="--text"):
        heldout_loss(exported, None)


def test_bits_per_byte_count_the_bytes_of_the_text(trained: Trained, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("naïve = 1\n" * 100, encoding="utf-8")
    found = text_loss(trained, text)
    ids = trained.tokenizer(text.read_text())["input_ids"]
    windows = -(-len(ids) // trained.window)
    assert found.tokens == len(ids) - windows, "the first of each window is given"
    assert 0.8 * text.stat().st_size < found.bytes <= text.stat().st_size
    assert found.bits_per_byte == pytest.approx(found.nats / log(2) / found.bytes)


def test_text_that_cannot_be_evaluated_is_rejected(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"na\xefve")
    (tmp_path / "short").write_text("a")
    for name, reason in (("latin", "UTF-8"), ("short", "two tokens"), ("none", "read")):
        with pytest.raises(PsycheError, match=reason):
            text_loss(trained, tmp_path / name)


def test_a_directory_without_a_model_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(PsycheError, match="neither"):
        load_trained(tmp_path, "cpu")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PsycheError, match="export it again"):
        load_trained(tmp_path, "cpu")


# ---------------------------------------------------------------------------------------- generating


def said(trained: Trained, prompt: str, sampling: Sampling) -> str:
    pieces: list[str] = []
    generate(trained, prompt, sampling, pieces.append)
    return "".join(pieces)


def test_equal_seeds_generate_equal_text(trained: Trained) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = said(trained, "import os", Sampling(tokens=12, seed=1))
    assert one.startswith("import os")
    assert len(one) > len("import os")
    assert one == said(trained, "import os", Sampling(tokens=12, seed=1))
    assert one != said(trained, "import os", Sampling(tokens=12, seed=2))
    assert torch.equal(torch.rand(1), expected), "the process's own random numbers"


def test_temperature_0_is_greedy_decoding(trained: Trained) -> None:
    ids = trained.tokenizer("class A", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = int(trained.model(input_ids=ids).logits[0, -1].argmax())
    text = said(trained, "class A", Sampling(tokens=1, temperature=0.0, seed=3))
    assert text == trained.tokenizer.decode([*ids[0].tolist(), best], skip_special_tokens=True)


def test_a_prompt_that_fills_the_context_is_rejected_and_long_output_cut(trained: Trained) -> None:
    with pytest.raises(PsycheError, match="context of 64"):
        said(trained, "x = 1\n" * 100, Sampling())
    with pytest.raises(PsycheError, match="empty"):
        said(trained, "", Sampling())
    assert said(trained, "import", Sampling(tokens=10**6)).startswith("import")


# ----------------------------------------------------------------------------------------- commands


def test_the_commands_work_on_an_export(place: Place, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("import os\n" * 50)
    runner = CliRunner()
    judged = runner.invoke(app, ["eval", str(place.exported), "--text", str(text), "--device", "cpu"])
    assert judged.exit_code == 0, judged.output
    assert "bits per byte" in judged.output
    heard = runner.invoke(app, ["generate", str(place.exported), "import", "--tokens", "3", "--device", "cpu"])
    assert heard.exit_code == 0
    assert heard.output.startswith("import")
    lonely = runner.invoke(app, ["eval", str(place.exported), "--limit", "3"])
    assert isinstance(lonely.exception, PsycheError)


def test_tasks_are_scored_by_the_harness(place: Place, tmp_path: Path) -> None:
    """A task on local files: which of two words follows."""
    pytest.importorskip("lm_eval", reason="an extra: pip install 'psyche[eval]'")
    rows = [{"q": f"import {n}", "choices": [" os", " xyzzy"], "answer": 0} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "words.yaml").write_text(
        "task: words\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        "doc_to_text: '{{q}}'\n"
        "doc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    one = load_trained(place.exported, "cpu")
    scores = task_scores(one, ["words"], shots=0, limit=4, include=tmp_path)
    (accuracy,) = (score for score in scores if score.metric == "acc")
    assert accuracy.task == "words"
    assert 0.0 <= accuracy.value <= 1.0
    with pytest.raises(PsycheError, match="unknown to lm-eval"):
        task_scores(one, ["no-such-task"], shots=None, limit=None, include=tmp_path)
