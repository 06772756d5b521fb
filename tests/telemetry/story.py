"""A made-up but consistent run, told as events: what the tests of views, reports and W&B read."""

from __future__ import annotations

import math
from collections.abc import Iterator

from psyche.config import Manifest, Model, Resolved, Rounds, Run
from psyche.telemetry.events import (
    Attested,
    Event,
    GenesisJudged,
    MemberMetrics,
    PeerJoined,
    RoundCertified,
    RoundStarted,
    RunFinished,
    RunStarted,
)
from psyche.telemetry.metrics import Limits
from psyche.telemetry.monitor import Totals, summarise

PEERS = tuple("12D3KooW" + letter * 44 for letter in "ABCD")
PARAMETERS = 1_900_000
PAYLOAD = PARAMETERS * 65 // 64  # int8, block 256: 8.125 bit a parameter
STEPS = 20
RUN = Run(
    name="demo",
    model=Model(settings={"vocab_size": 4096}),
    rounds=Rounds(total=16, inner_steps=STEPS, start_members=4, min_members=4),
)
MANIFEST = Manifest(
    run=RUN,
    resolved=Resolved(
        coordinators=(PEERS[0],),
        store="0" * 64,
        layout="1" * 64,
        genesis="2" * 64,
        parameters=PARAMETERS,
        flat_size=PARAMETERS,
    ),
)
LIMITS = Limits.of(RUN, PARAMETERS, len(PEERS))


def root(number: int) -> str:
    return f"{0x7C1F0000 + number:064x}"[::-1]


def metrics(number: int = 1, peer: str = PEERS[0], **changes: object) -> MemberMetrics:
    loss = 4.2 + 4.1 * math.exp((1 - number) / 5)
    values: dict[str, object] = {
        "round": number,
        "peer": peer,
        "train_loss": loss + 0.1,
        "heldout_loss_sum": loss * 2000,
        "heldout_tokens": 2000,
        "tokens": STEPS * RUN.tokens_per_step,
        "inner_steps": STEPS,
        "train_seconds": 18.0,
        "exchange_seconds": 1.5,
        "round_seconds": 20.0,
        "lr": 4e-4,
        "pseudo_gradient_norm": 1.25,
        "momentum_norm": 2.5,
        "bytes_up": 3 * PAYLOAD,
        "bytes_down": 3 * PAYLOAD,
        "payload_bytes": PAYLOAD,
    }
    return MemberMetrics(**(values | changes))  # type: ignore[arg-type]


def certified(number: int, accepted: tuple[str, ...] = PEERS, **changes: object) -> RoundCertified:
    values: dict[str, object] = {
        "round": number,
        "accepted": accepted,
        "excluded": (),
        "state_root": root(number),
        "seconds": 20.0,
    }
    return RoundCertified(**(values | changes))  # type: ignore[arg-type]


def started() -> RunStarted:
    return RunStarted(
        run_id=MANIFEST.run_id.hex(),
        name="demo",
        parameters=PARAMETERS,
        peers=4,
        rounds=16,
        inner_steps=STEPS,
        codec="int8",
        invite="psyche1abc",
        time=1000.0,
    )


def story(rounds: int = 16) -> Iterator[Event]:
    """The coordinator's log of a run without incident, ``rounds`` rounds of its 16."""
    yield started()
    yield GenesisJudged(8.317, 8000, time=1000.0)
    for peer in PEERS:
        yield PeerJoined(peer, "cpu", 1, time=1001.0)
    totals = Totals()
    for number in range(1, rounds + 1):
        now = 1001.0 + 20 * number
        yield RoundStarted(number, PEERS, STEPS, time=now - 20)
        yield certified(number, time=now)
        reports = [metrics(number, peer, time=now) for peer in PEERS]
        yield from reports
        yield from (Attested(number, peer, root(number), time=now) for peer in PEERS)
        done = certified(number)
        summary = summarise(number, reports, parameters=PARAMETERS, limits=LIMITS, certified=done, totals=totals)
        totals = Totals.after(summary)
        yield summary
    yield RunFinished(rounds, "all rounds done", time=1001.0 + 20 * rounds)
