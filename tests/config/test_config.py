"""Configuration: what is wrong is refused with the field's path and a reason; what is right is a manifest."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from psyche.config import Config, Manifest, Node, Wandb, load_config, load_node, override_node
from psyche.errors import ConfigError
from tests.protocol.one_leader import peer_id

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
GOOD: dict[str, Any] = {
    "run": {
        "name": "test",
        "model": {"settings": {"vocab_size": 4096, "hidden_size": 64}},
        "data": {"tokenizer": {"kind": "bpe", "vocab_size": 4096}},
    }
}
RESOLVED: dict[str, Any] = {
    "coordinators": (peer_id(0),),
    "store": "a" * 64,
    "layout": "b" * 64,
    "genesis": "c" * 64,
    "parameters": 100,
    "flat_size": 4096,
}


def with_value(path: str, value: Any) -> dict[str, Any]:
    tree = deepcopy(GOOD)
    *parents, last = path.split(".")
    at = tree
    for key in parents:
        at = at.setdefault(key, {})
    at[last] = value
    return tree


def load(tree: Any, directory: Path) -> Config:
    path = directory / "run.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return load_config(path)


def manifest(**changes: Any) -> Manifest:
    return Manifest.model_validate({"run": GOOD["run"], "resolved": RESOLVED | changes})


# ----------------------------------------------------------------------------------------- reading


def test_the_demo_loads() -> None:
    config = load_config(DEMO)
    assert config.run.name == "demo"
    assert config.run.total_steps == 14 * 100
    assert config.run.tokens_per_step == 2 * 256


@pytest.mark.parametrize("path", sorted(DEMO.parent.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    load_config(path)


def test_defaults_fill_in_the_rest(tmp_path: Path) -> None:
    config = load(GOOD, tmp_path)
    assert config.run.outer.lr == 0.7
    assert config.node == Node()


WRONG: list[tuple[str, Any, str]] = [
    ("extra", 1, "unknown key"),
    ("run.extra", 1, "unknown key"),
    ("run.inner.learning_rate", 1e-3, "unknown key"),
    ("run.codec.bits", 8, "unknown key"),
    ("node.gpu", 2, "unknown key"),
    ("node.wandb.key", "x", "unknown key"),
    ("run.resolved", {}, "unknown key"),
    ("run.name", "", "pattern"),
    ("run.name", "two words", "pattern"),
    ("run.name", "a/../b", "pattern"),
    ("run.name", "x" * 65, "pattern"),
    ("run.seed", -1, "greater than or equal to 0"),
    ("run.seed", 2**63, "less than"),
    ("run.seed", "7", "valid integer"),
    ("run.seed", 1.0, "valid integer"),
    ("run.seed", True, "valid integer"),
    ("run.rounds.inner_steps", 0, "greater than or equal to 1"),
    ("run.rounds.inner_steps", -3, "greater than or equal to 1"),
    ("run.rounds.inner_steps", 2.5, "valid integer"),
    ("run.rounds.total", 0, "greater than or equal to 1"),
    ("run.rounds.start_members", 0, "greater than or equal to 1"),
    ("run.inner.lr", 0.0, "greater than 0"),
    ("run.inner.lr", float("nan"), "finite"),
    ("run.inner.lr", float("inf"), "finite"),
    ("run.inner.betas", [0.9, 1.0], "less than 1"),
    ("run.inner.betas", [0.9], "required"),
    ("run.inner.betas", [0.9, float("nan")], "than"),
    ("run.inner.batch_size", 0, "greater than or equal to 1"),
    ("run.inner.schedule", "linear", "cosine"),
    ("run.inner.warmup_steps", -1, "greater than or equal to 0"),
    ("run.inner.final_lr", 1.5, "less than or equal to 1"),
    ("run.inner.decay_fraction", 0.0, "greater than 0"),
    ("run.inner.clip", 0, "greater than 0"),
    ("run.outer.lr", -0.7, "greater than 0"),
    ("run.outer.momentum", 1.0, "less than 1"),
    ("run.codec.name", "int3", "unknown"),
    ("run.codec.error_feedback", 1.5, "less than or equal to 1"),
    ("run.data.sequence_length", 4, "greater than or equal to 8"),
    ("run.data.heldout_fraction", 0.0, "greater than 0"),
    ("run.data.heldout_fraction", 0.9, "less than or equal to 0.5"),
    ("run.data.mirrors", ["file:///etc"], "pattern"),
    ("run.data.source", {"kind": "floppy"}, "does not match"),
    ("run.data.source", {"kind": "text"}, "required"),
    ("run.data.source", {"kind": "text", "paths": []}, "at least 1"),
    ("run.data.tokenizer", {"kind": "bpe", "vocab_size": 100}, "greater than or equal to 260"),
    ("run.deadlines.silence", 0, "greater than 0"),
    ("node.device", "tpu", "pattern"),
    ("node.device", "cuda:x", "pattern"),
    ("node.precision", "fp16", "auto"),
    ("node.threads", 0, "greater than or equal to 1"),
    ("node.micro_batch", 0, "greater than or equal to 1"),
    ("node.checkpoints_kept", 0, "greater than or equal to 1"),
    ("node.data_cache", "plenty", "not a size such as"),
    ("node.listen", [], "at least 1"),
    ("node.wandb.mode", "sometimes", "auto"),
    ("run.model.settings.vocab_size", "many", "vocab_size"),
    ("run.model.settings.vocab_size", [4096], "vocab_size"),
    ("run.model.settings.vocab_size", None, "vocab_size"),
    ("run.model.settings.vocab_size", float("inf"), "vocab_size"),
    ("run.model.settings.vocab_size", -5, "vocab_size"),
    ("run.model.settings.vocab_size", 4096.5, "vocab_size"),
]


@pytest.mark.parametrize(("path", "value", "reason"), WRONG, ids=[f"{p}={v}"[:60] for p, v, _ in WRONG])
def test_a_wrong_value_is_rejected_with_its_path(path: str, value: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(with_value(path, value), tmp_path)
    text = str(error.value)
    assert "run.yaml" in text
    assert path.removesuffix(".settings.vocab_size").removesuffix(".name") in text or path in text
    assert reason in text
    assert "\n" not in text


CONTRADICTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"rounds": {"start_members": 2, "min_members": 3}}, "run.rounds", "min_members (3) is above start_members (2)"),
    ({"deadlines": {"round_min": 9.0, "round_max": 8.0}}, "run.deadlines", "round_min (9.0) is above round_max (8.0)"),
    ({"deadlines": {"exchange_min": 9.0, "exchange_max": 8.0}}, "run.deadlines", "exchange_min (9.0) is above"),
    ({"model": {"settings": {"vocab_size": 300}}}, "run", "smaller than data.tokenizer.vocab_size (4096)"),
    ({"model": {"settings": {}}}, "run", "model.settings.vocab_size is missing"),
]


@pytest.mark.parametrize(("changes", "path", "reason"), CONTRADICTIONS, ids=[reason for *_, reason in CONTRADICTIONS])
def test_contradictions_are_rejected(changes: dict[str, Any], path: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load({"run": GOOD["run"] | changes}, tmp_path)
    assert f"{path}: " in str(error.value)
    assert reason in str(error.value)


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    tree = with_value("run.inner.lr", -1.0)
    tree["node"] = {"threads": 0, "colour": "red"}
    with pytest.raises(ConfigError) as error:
        load(tree, tmp_path)
    for path in ("run.inner.lr", "node.threads", "node.colour"):
        assert path in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "just words", "a: [", "\t", "run: {name: x", "&a [*a]", "!!python/object:x"]
)
def test_a_file_that_is_not_a_configuration_is_rejected(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load(text, tmp_path)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: \xff}")
    with pytest.raises(ConfigError, match=r"latin\.yaml"):
        load_config(tmp_path / "latin.yaml")


def test_the_node_section_is_read_alone(tmp_path: Path) -> None:
    assert load_node(None) == Node()
    path = tmp_path / "node.yaml"
    path.write_text("node: {threads: 3}\nrun: {whatever: 1}\n")
    assert load_node(path).threads == 3
    path.write_text("node: {thread: 3}\n")
    with pytest.raises(ConfigError, match=r"thread: unknown key"):
        load_node(path)
    path.write_text("run: {}\n")
    assert load_node(path) == Node()


def test_the_command_line_overrides_the_file() -> None:
    node = Node(listen=["/ip4/0.0.0.0/tcp/0", "/ip4/127.0.0.1/tcp/5"], threads=2)
    changed = override_node(node, device="cpu", port=7777)
    assert (changed.device, changed.threads) == ("cpu", 2)
    assert changed.listen == ("/ip4/0.0.0.0/tcp/7777", "/ip4/127.0.0.1/tcp/7777")
    assert override_node(node) == node
    with pytest.raises(ConfigError, match="command line: device"):
        override_node(node, device="abacus")
    with pytest.raises(ConfigError, match="command line: threads"):
        override_node(node, threads=0)


def test_a_configuration_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(DEMO).run.seed = 3  # type: ignore[misc]


# ---------------------------------------------------------------------------------------- manifest


def test_a_manifest_is_encoded_canonically() -> None:
    given = manifest()
    assert Manifest.decode(given.encode()) == given
    assert Manifest.decode(given.encode()).run_id == given.run_id
    assert given.encode() == manifest().encode()


def test_explicit_defaults_give_the_same_run_id() -> None:
    spelled = GOOD["run"] | {"seed": 0, "rounds": {"total": 100}, "inner": {"lr": 4e-4}}
    assert Manifest.model_validate({"run": spelled, "resolved": RESOLVED}).run_id == manifest().run_id


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if isinstance(value, BaseModel):
        return [leaf for key in type(value).model_fields for leaf in leaves(getattr(value, key), (*path, key))]
    return [(path, value)]


def other(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value * 0.5 + 0.013
        case str():
            return ("f" if value[:1] != "f" else "e") + value[1:]
        case None:
            return 7
        case ():
            return ("a name",)
        case tuple():
            return (*value[:-1], other(value[-1]))
        case dict():
            return value | {"one_more": 1}
    raise AssertionError(value)


def replaced(model: Any, path: tuple[str, ...], value: Any) -> Any:
    if not path:
        return value
    return model.model_copy(update={path[0]: replaced(getattr(model, path[0]), path[1:], value)})


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize("path", [path for path, _ in leaves(manifest())], ids=".".join)
def test_the_run_id_changes_with_every_field(path: tuple[str, ...]) -> None:
    given = manifest()
    value = dict(leaves(given))[path]
    assert replaced(given, path, other(value)).run_id != given.run_id


TREE = msgspec.msgpack.decode(manifest().encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc0",
        b"\xc1",
        b"\x80",
        b"\xdf\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\x81\xa1\xff\x01",
        msgspec.msgpack.encode(TREE)[::-1],
        manifest().encode() + b"\x00",
        manifest().encode()[:-1],
        msgspec.msgpack.encode(dict(reversed(TREE.items()))),
        msgspec.msgpack.encode(TREE | {"more": 1}, order="sorted"),
        msgspec.msgpack.encode({"run": TREE["run"]}, order="sorted"),
        msgspec.msgpack.encode(GOOD | {"resolved": RESOLVED}, order="sorted"),
    ],
    ids=range(14),
)
def test_bytes_that_are_not_a_manifest_are_rejected(data: bytes) -> None:
    with pytest.raises(ConfigError, match="the run manifest"):
        Manifest.decode(data)


@pytest.mark.parametrize(
    "value",
    [b"\xff\xfe", b"text", {"a": b"\xff"}, [[b"\xff"]], float("nan"), {"deep": [[[[1]]]]}, 2**64 - 1],
    ids=str,
)
def test_a_hostile_manifest_is_rejected_with_a_message(value: object) -> None:
    """``model.settings`` is free-form: nothing in it gets past, or breaks, the check of canonical form."""
    tree = deepcopy(TREE)
    tree["run"]["model"]["settings"]["surprise"] = value
    try:
        found = Manifest.decode(msgspec.msgpack.encode(tree, order="sorted"))
    except ConfigError:
        return
    assert found.encode() == msgspec.msgpack.encode(tree, order="sorted")


def test_a_very_deep_manifest_is_rejected() -> None:
    tree = deepcopy(TREE)
    deep: list[Any] = []
    for _ in range(400):
        deep = [deep]
    tree["run"]["model"]["settings"]["deep"] = deep
    with pytest.raises(ConfigError, match=r"settings\.deep"):
        Manifest.decode(msgspec.msgpack.encode(tree, order="sorted"))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_mutated_manifests_are_rejected_or_canonical(data: st.DataObject) -> None:
    changed = bytearray(manifest().encode())
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = Manifest.decode(bytes(changed))
    except ConfigError:
        return
    assert found.encode() == bytes(changed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("coordinators", ()),
        ("coordinators", ("12D3KooWshort",)),
        ("store", "a" * 63),
        ("layout", "A" * 64),
        ("genesis", "a" * 64 + "\n"),
        ("parameters", 0),
        ("flat_size", 0),
    ],
)
def test_resolved_fields_are_validated(field: str, value: Any) -> None:
    tree = deepcopy(TREE)
    tree["resolved"][field] = value
    with pytest.raises(ConfigError, match=f"resolved.{field}"):
        Manifest.decode(msgspec.msgpack.encode(tree, order="sorted"))


def test_floats_may_be_written_in_scientific_notation(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("run: {name: a, model: {settings: {vocab_size: 4096}}, inner: {lr: 4e-4, eps: 1E-8}}\n")
    inner = load_config(path).run.inner
    assert (inner.lr, inner.eps) == (4e-4, 1e-8)


# ------------------------------------------------------------------------------------ private data


def test_private_data_needs_a_budget_and_a_budget_needs_data() -> None:
    for told in ({"path": Path("own")}, {"epsilon": 8.0}):
        with pytest.raises(ConfigError, match="--private-data DIR needs --epsilon"):
            override_node(Node(), private=told)
    node = override_node(Node(), private={"path": Path("own"), "epsilon": 8.0, "delta": None})
    assert node.private is not None
    assert (node.private.path, node.private.epsilon, node.private.delta) == (Path("own"), 8.0, 1e-6)
    again = override_node(node, private={"epsilon": 2.0, "noise_multiplier": None})
    assert again.private == node.private.model_copy(update={"epsilon": 2.0})
    assert override_node(node, private={"path": None}) == node


def test_losses_on_private_data_are_not_sent_to_wandb() -> None:
    with pytest.raises(ConfigError, match="losses on private data"):
        override_node(Node(wandb=Wandb(own_run=True)), private={"path": Path("own"), "epsilon": 1.0})


@pytest.mark.parametrize(
    "federated", [{}, {"clip": 0.0}, {"clip": 1.0, "max_share": 0.0}, {"clip": 1.0, "max_share": 1.1}]
)
def test_federated_needs_a_clip_and_a_share(federated: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.federated\."):
        load(with_value("run.federated", federated), tmp_path)


def test_a_run_accepts_no_private_data_by_default(tmp_path: Path) -> None:
    assert load(GOOD, tmp_path).run.private_share == 0.0
    assert load(with_value("run.federated", {"clip": 2.0}), tmp_path).run.private_share == 0.25
