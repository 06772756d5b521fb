"""``psyche ledger credits``, ``why``, ``claims`` and ``proof``, and the audits in ``show``."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from psyche.config import MANIFEST
from psyche.config.ethereum_address import checksummed
from psyche.config.manifest import chain_rules
from psyche.errors import PsycheError
from psyche.ledger.store import NAME
from psyche.ledger.verify import STRETCH, verify_ledger
from psyche.numerics.digest import digest
from psyche.payouts.merkle_tree import Claim, proves
from psyche.protocol.audit_messages import EMPTY, Audit, Closed, Finding, Verdict
from psyche.protocol.chain import BadLedger
from psyche.protocol.credits import fold
from psyche.protocol.messages import Record
from psyche.telemetry.lines import exclusion_sentence
from tests import bulk, chains
from tests.chains import MEMBERS, NAMES, REASON, chain
from tests.ledgers import EACH, change, fill, psyche_ledger

A, B, C, D = NAMES
SHORT = [f"…{name[-6:]}" for name in NAMES]


def with_conviction(record: Record) -> Record:
    """Put round 2 of the first node under audit; two auditors convict it in round 4."""
    plan = record.plan
    if plan.round in (2, 3):
        audit = Audit(
            **fields(
                Audit, accused=A, round=2, tokens=EACH, candidates=(B, C), weights=(1, 1), opinions=(), declined=()
            )
        )
        return msgspec.structs.replace(record, audit_state=msgspec.structs.replace(EMPTY, audits=(audit,)))
    if plan.round == 4:
        found = Finding("measured", 310_000, 1, -5), Finding("false", 0, 0, 0)
        statements = tuple(
            chains.sealed(auditor, Verdict(A, 2, one, bytes(32)), 2)
            for auditor, one in zip(MEMBERS[1:3], found, strict=True)
        )
        ended = Closed(A, 2, "convicted", (B, C), (), 0)
        audit_state = msgspec.structs.replace(EMPTY, statements=statements, closed=(ended,), banned=(A,))
        return msgspec.structs.replace(record, audit_state=audit_state)
    if plan.round > 4:
        return msgspec.structs.replace(record, audit_state=msgspec.structs.replace(EMPTY, banned=(A,)))
    return msgspec.structs.replace(record, audit_state=EMPTY)


def fields(kind: type[Audit], **known: object) -> dict[str, object]:
    """Return all fields of a message: the ``known`` ones, 1 for the others."""
    return {name: known.get(name, 1) for name in kind.__struct_fields__}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A node's directory of a run of six rounds with a conviction."""
    fill(tmp_path / NAME, chain(6, edit=with_conviction))
    (tmp_path / MANIFEST).write_bytes(chains.MANIFEST.encode())
    return tmp_path


def words(*arguments: object) -> str:
    result = psyche_ledger(*arguments)
    assert result.exit_code == 0, result.exception
    return " ".join(result.stdout.split())


def test_credits_are_a_table(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    table = words("credits", directory)
    assert "credits after round 6" in table
    assert f"{SHORT[0]} 0 0 {6 * EACH:,} 0/1 convicted in round 4" in table
    assert f"{SHORT[1]} 0 {7 * EACH:,} 1" in table, "an audit is paid like the work it replays"
    assert SHORT[2] not in words("credits", directory, "--node", SHORT[1])


def test_credits_as_json(directory: Path) -> None:
    report = json.loads(psyche_ledger("credits", directory, "--json", "--node", A[-6:]).stdout)
    (credit,) = report["credits"]
    assert (credit["node"], credit["forfeited"], credit["banned"], credit["payout"]) == (A, 6 * EACH, 4, None)
    assert (report["round"], report["missing"]) == (6, [])


def test_rounds_that_are_missing_are_not_counted(directory: Path) -> None:
    for table in ("rounds", "members", "audits"):
        change(directory / NAME, f"DELETE FROM {table} WHERE round < 3")
    found = psyche_ledger("credits", directory)
    assert found.exit_code == 1
    assert found.stdout.startswith("incomplete: this ledger lacks rounds 1–2, whose credits are not counted")
    assert psyche_ledger("credits", directory, "--json").exit_code == 1


def test_why_lists_each_change_with_its_reason(directory: Path) -> None:
    lines = psyche_ledger("why", directory, A[-6:]).stdout.splitlines()
    assert lines[0] == (
        f"round 1: {EACH:,} earned: its contribution was accepted; forfeited in round 4, because its work of round 2 "
        f"was found to be false, by {SHORT[1]}, {SHORT[2]}"
    )
    assert lines[4].startswith(f"round 5: {EACH:,} earned: ")
    assert lines[4].endswith("forfeited at once, because it was convicted in round 4")
    assert lines[-1].startswith(f"0 final, 0 pending, {6 * EACH:,} forfeited; no payout address")
    assert lines[-1].endswith("convicted in round 4: it earns nothing any more")
    others = psyche_ledger("why", directory, B).stdout
    assert f"round 4: {EACH:,} earned: it audited {SHORT[0]}, round 2; pending until round 10" in others
    left_out = psyche_ledger("why", directory, D).stdout.splitlines()
    assert left_out[0] == f"round 1: nothing: {exclusion_sentence(REASON)}"
    assert "no member" in str(psyche_ledger("why", directory, "nobody").exception)


def test_why_as_json(directory: Path) -> None:
    history = json.loads(psyche_ledger("why", directory, D, "--json").stdout)
    assert history["credit"]["pending"] == 3 * EACH
    assert len(history["changes"]) == 6


def test_show_names_convicted_nodes_and_the_evidence(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    shown = words("show", directory)
    evidence = f"{SHORT[1]}: relative error 0.3100 in segment 1; {SHORT[2]}: false"
    assert f"{SHORT[0]}, round 2: convicted ({evidence})" in shown
    report = json.loads(psyche_ledger("show", directory, "--json", "--node", B).stdout)
    (ending,) = report["rounds"][3]["audits"]
    assert [one["auditor"] for one in ending["findings"]] == [B, C]


# ------------------------------------------------------------------------------------------- claims


EACH_BULK = (lambda rules: rules.inner_steps * rules.tokens_per_step)(chain_rules(bulk.bulk_manifest(8)))
"""Tokens of a contribution in :data:`finished`."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node's directory of a finished run of five nodes: one has no payout address, two share one."""
    directory = tmp_path_factory.mktemp("finished")
    a, b, c = (digest(name)[:20] for name in "abc")
    bulk.bulk_ledger(directory, 8, 5, payouts=[b"", a, b, a, c])
    return directory


def test_claims_are_a_merkle_tree_with_a_proof_for_each_address(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "claims.json"
    result = psyche_ledger("claims", finished, "--out", out)
    assert result.exit_code == 0, result.exception
    content = json.loads(out.read_text())
    assert (content["format"], content["leafEncoding"]) == ("standard-v1", ["address", "uint256"])
    root = content["psyche"]["root"]
    assert content["tree"][0] == root
    assert f"root: {root}" in result.stdout
    each = 8 * EACH_BULK
    amounts = {checksummed(digest(name)[:20]): each * times for name, times in (("a", 2), ("b", 1), ("c", 1))}
    assert {value[0]: int(value[1]) for value in (one["value"] for one in content["values"])} == amounts
    for one, value in zip(content["psyche"]["claims"], content["values"], strict=True):
        claim = Claim(bytes.fromhex(one["address"][2:]), int(one["amount"]))
        assert content["tree"][value["treeIndex"]] == "0x" + claim.leaf.hex()
        assert proves(bytes.fromhex(root[2:]), claim, [bytes.fromhex(step[2:]) for step in one["proof"]])
    (unclaimed,) = content["psyche"]["unclaimed"].items()
    assert unclaimed[1] == str(each)
    assert f"unclaimed: {each:,} of {unclaimed[0]}" in result.stdout


def test_a_proof_is_checked_offline(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "claims.json"
    psyche_ledger("claims", finished, "--out", out)
    content = json.loads(out.read_text())
    one = content["psyche"]["claims"][0]
    found = psyche_ledger("proof", out, one["address"].lower()).stdout
    assert content["psyche"]["root"] in found
    assert all(step in found for step in one["proof"])
    assert found == psyche_ledger("proof", out, one["nodes"][0][-8:]).stdout
    assert "no claim" in str(psyche_ledger("proof", out, "nobody").exception)
    one["amount"] = str(int(one["amount"]) + 1)
    out.write_text(json.dumps(content))
    assert "the file was changed" in str(psyche_ledger("proof", out, one["address"]).exception)
    out.write_text("{}")
    assert "was not written by" in str(psyche_ledger("proof", out, one["address"]).exception)


def test_weights_are_exported_by_node(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights.json"
    assert "weights of 5 nodes" in psyche_ledger("claims", finished, "--out", out, "--format", "weights").stdout
    content = json.loads(out.read_text())
    assert [one["weight"] for one in content["weights"]] == [65535] * 5
    assert [one["node"] for one in content["weights"]] == sorted(one["node"] for one in content["weights"])


def test_claims_need_a_complete_ledger_with_final_credit_and_an_address(
    directory: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "claims.json"
    fill(tmp_path / "pending" / NAME, chain(2))
    manifest = directory / MANIFEST
    refused = psyche_ledger("claims", tmp_path / "pending", "--out", out, "--manifest", manifest).exception
    assert isinstance(refused, PsycheError)
    assert "is final yet" in str(refused)
    fill(tmp_path / "late" / NAME, chain(4)[2:])
    refused = psyche_ledger("claims", tmp_path / "late", "--out", out, "--manifest", manifest).exception
    assert "lacks 2 rounds" in str(refused)
    bulk.bulk_ledger(tmp_path / "unnamed", 3, 2, payouts=[b"", b""])
    refused = psyche_ledger("claims", tmp_path / "unnamed", "--out", out).exception
    assert "psyche join --payout" in str(refused)
    assert not out.exists()


def test_a_long_ledger_is_verified_by_several_processes(tmp_path: Path) -> None:
    rounds = 2 * STRETCH + 5
    manifest = bulk.bulk_ledger(tmp_path, rounds, 2)
    seen: list[tuple[int, int]] = []
    alone = verify_ledger(tmp_path / NAME, manifest, workers=1)
    found = verify_ledger(tmp_path / NAME, manifest, workers=2, progress=lambda *at: seen.append(at))
    assert seen == [(STRETCH, rounds), (2 * STRETCH, rounds), (rounds, rounds)]
    assert (found.rounds, found.tokens) == (alone.rounds, alone.tokens) == (rounds, found.tokens)
    records = [record for _, record, _ in bulk.bulk_chain(manifest, 2)]
    assert found.credits.accounts == alone.credits.accounts == fold(chain_rules(manifest), records).accounts
    for bad in (STRETCH, STRETCH + 1, rounds):
        good = (tmp_path / NAME).read_bytes()
        change(tmp_path / NAME, "UPDATE rounds SET base_root = x'00' WHERE round = ?", bad)
        with pytest.raises(BadLedger) as caught:
            verify_ledger(tmp_path / NAME, manifest, workers=2)
        assert caught.value.round == bad
        (tmp_path / NAME).write_bytes(good)
    change(tmp_path / NAME, "UPDATE rounds SET state_root = ? WHERE round = ?", b"r" * 32, STRETCH)
    with pytest.raises(BadLedger, match=f"round {STRETCH + 1}: .*another state"):
        verify_ledger(tmp_path / NAME, manifest, workers=2)
