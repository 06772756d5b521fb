"""Typed events: what every process says of itself, in its log and to whoever looks at it.

One event is one line, for example::

    {"type":"PeerLeft","peer":"12D3Koo…","reason":"silent for 15 s","round":3,"time":1700000000.5,"node":"12D3Koo…"}

Rounds count from 1, as in the protocol: round r ends with the r-th outer step. Round 0 is the model before any
of them, or stands where a round is not known yet. Peers are PeerIDs, hashes are lower-case hex, times are unix
seconds, durations are seconds, sizes are bytes, losses are nats a predicted token.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Measured = float | None
"""A measurement; ``None`` where there is none. JSON has no NaN or infinity: they too come back as ``None``."""

Phase = Literal[
    "joining",
    "compiling",
    "warming",
    "waiting",
    "following",
    "training",
    "committing",
    "exchanging",
    "certifying",
    "paused",
    "finished",
]


class Event(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="type"):
    """The fields of every event, which :class:`EventLog` fills in."""

    time: float = 0.0
    """When it was logged, unix seconds."""
    node: str = ""
    """PeerID of the node that logged it."""


class RunStarted(Event, frozen=True):
    """A node entered a run (again, after a restart)."""

    run_id: str
    name: str
    parameters: int
    peers: int
    """Members that must be there before the first round starts."""
    rounds: int
    inner_steps: int
    """H: inner steps a round."""
    codec: str
    invite: str = ""
    """The invite for others; empty on a node that does not share it."""


class GenesisJudged(Event, frozen=True):
    """Held-out loss of the outer parameters before round 1: where the loss curve starts."""

    heldout_loss: Measured
    heldout_tokens: int


class PeerJoined(Event, frozen=True):
    """A member is there."""

    peer: str
    device: str
    """The hardware it trains on, as it describes it."""
    round: int
    """The first round it may be part of."""


class PeerLeft(Event, frozen=True):
    """A member is gone, and why."""

    peer: str
    reason: str
    round: int
    """The round that was open, or would have been the next."""


class PhaseChanged(Event, frozen=True):
    """What this node does now."""

    round: int
    """0 while this node knows of none."""
    phase: Phase


class Downloading(Event, frozen=True):
    """Progress of a large download (the model's state, a data shard)."""

    what: str
    received: int
    total: int


class RoundStarted(Event, frozen=True):
    """A round was opened for these members."""

    round: int
    members: tuple[str, ...]
    inner_steps: int
    """H; in a worker's own log, its quota."""


class StepDone(Event, frozen=True):
    """This node's own inner step. The emitter limits the rate: about one a second is plenty."""

    round: int
    step: int
    """Inner steps done in this round, from 1."""
    global_step: int
    """Inner steps this node has done in the run, from 1."""
    loss: Measured
    lr: float
    tokens_per_second: Measured


class RoundCertified(Event, frozen=True):
    """A round is closed for good."""

    round: int
    accepted: tuple[str, ...]
    excluded: tuple[tuple[str, str], ...]
    """(peer, code of ``ExclusionReason``) of each member whose work was not used."""
    state_root: str
    """Hash of the outer state after this round."""
    seconds: float
    """Seconds from the end of the round before to the end of this one, on the emitter's clock."""


class Attested(Event, frozen=True):
    """A member says which outer state it holds after a round."""

    round: int
    peer: str
    state_root: str


class MemberMetrics(Event, frozen=True):
    """What one member measured in one round. Self-reported: the signature proves the author, not the numbers.

    Each field but ``round`` and ``peer`` has a row in :data:`psyche.telemetry.metrics.MEASUREMENTS`.
    """

    round: int
    peer: str
    train_loss: Measured = None
    """Mean over the tokens of the member's inner steps; ``None`` if its data is private."""
    heldout_loss_sum: Measured = None
    """Loss of the outer parameters on the member's share of the held-out set, summed over ``heldout_tokens``."""
    heldout_tokens: int = 0
    tokens: int = 0
    """Tokens that the member trained on in this round."""
    inner_steps: int = 0
    train_seconds: Measured = None
    """Time spent in inner steps."""
    exchange_seconds: Measured = None
    """Time from the member's payload being ready to its outer step."""
    round_seconds: Measured = None
    lr: Measured = None
    """Learning rate of the member's last inner step."""
    pseudo_gradient_norm: Measured = None
    """L2 norm of the member's own pseudo-gradient."""
    momentum_norm: Measured = None
    """L2 norm of the outer momentum; equal on all honest nodes."""
    bytes_up: int = 0
    bytes_down: int = 0
    payload_bytes: int = 0
    """Size of the member's encoded pseudo-gradient."""

    @property
    def tokens_per_second(self) -> float | None:
        """Training speed, without the time that the exchange takes."""
        return self.tokens / self.train_seconds if self.train_seconds else None


class RoundSummary(Event, frozen=True):
    """A round in numbers, over all members: see :func:`psyche.telemetry.monitor.summarise`."""

    round: int
    state_root: str
    members: int
    """Members whose work was accepted."""
    excluded: int
    """Members whose work was not used."""
    reports: int
    """Members' metrics that went into this summary."""
    refused: int
    """Members' metrics that were impossible and left out."""
    seconds: Measured
    train_loss: Measured
    heldout_loss: Measured
    tokens: int
    tokens_total: int
    tokens_per_second: Measured
    lr: Measured
    pseudo_gradient_norm: Measured
    momentum_norm: Measured
    bytes_up: int
    bytes_down: int
    bytes_up_total: int
    bytes_down_total: int
    payload_ratio: Measured
    """Size of the parameters in fp32 over the median payload."""
    bytes_per_token: Measured
    """Bytes sent by all members over tokens trained on, both since the run's start."""
    exchange_seconds: Measured
    """Median over members."""
    exchange_seconds_max: Measured
    compute_utilisation: Measured
    """Mean over members of the share of the round spent in inner steps, 0 to 1."""
    rejections_total: int
    divergences_total: int
    audits_total: int
    """Audits that ended."""
    convictions_total: int
    """Nodes that were convicted, of what they contributed or of what they said as auditors."""


class Rejected(Event, frozen=True):
    """Something a peer sent was refused."""

    peer: str
    reason: str
    what: str
    code: str = ""
    """A ``RefusalCode`` where a coordinator refused it."""


def outvoted(peer: str, round_number: int) -> Rejected:
    """Return a reducer whose result was not that of the others."""
    return Rejected(peer, f"the other reducers of round {round_number} agree on another", "result")


class Diverged(Event, frozen=True):
    """A member holds another outer state than the certified one."""

    peer: str
    round: int
    expected: str
    found: str


class Resynchronised(Event, frozen=True):
    """This node fetched the certified outer state from a donor."""

    round: int
    """The round the state is of; 0 for the model before round 1."""
    state_root: str
    donor: str
    """A PeerID, or words for several: "the members"."""
    gave: tuple[tuple[str, int], ...] = ()
    """Bytes that came from each PeerID, the most first."""
    seconds: Measured = None
    """Seconds from the first request to the last byte."""
    moved: int = 0
    """Rounds that the run went on meanwhile, whose outer steps were taken on what had come."""


class CaughtUp(Event, frozen=True):
    """This node took outer steps of rounds that it had missed."""

    round: int
    """The last of them."""
    rounds: int
    """Number of rounds."""


class Checkpointed(Event, frozen=True):
    """A checkpoint is on disk."""

    round: int
    path: str


class AuditStarted(Event, frozen=True):
    """This node repeats another's work to check it, instead of training in the round that is under way."""

    peer: str
    """The audited node."""
    round: int
    """The round of the audited contribution."""
    during: int
    """The round under way."""


class Audited(Event, frozen=True):
    """This node has done a contribution of another again."""

    peer: str
    round: int
    outcome: Literal["measured", "false", "unserved"]
    error: float
    """Relative, of the worst segment."""
    grade: Literal["pass", "fail", "unsure", "unserved"]


class AuditEnded(Event, frozen=True):
    """The end of an audit, by the records."""

    peer: str
    """The audited node."""
    round: int
    """The round of the audited contribution."""
    outcome: Literal["passed", "inconclusive", "convicted", "unserved", "dropped"]
    lied: tuple[str, ...]
    """Auditors who said the opposite of what most found, and are convicted of that."""

    @property
    def matters(self) -> bool:
        """Return whether the audit had consequences for a node; most have none."""
        return bool(self.lied) or self.outcome in ("convicted", "unserved")


class PrivacySpent(Event, frozen=True):
    """The privacy budget that this node has spent in all rounds so far."""

    round: int
    epsilon: float
    budget: float
    """The ε at which this node stops."""
    delta: float
    rounds_left: int


class Leaving(Event, frozen=True):
    """This node was asked to leave, and waits for something first."""

    round: int
    """The one it has a part in; 0: none."""
    what: str
    """A sentence."""
    seconds: float
    """At most so long; 0: it goes now."""


class Left(Event, frozen=True):
    """This node has said goodbye, as it was asked to."""

    outcome: str
    """How its last round ended, as a sentence."""


class Notice(Event, frozen=True):
    """Something for a person to read."""

    level: Literal["debug", "info", "warning", "error"]
    """``debug``: for the log file only, not shown on the terminal."""
    text: str


class RunFinished(Event, frozen=True):
    """The run is over for this node."""

    rounds: int
    reason: str


AnyEvent = (
    RunStarted
    | GenesisJudged
    | PeerJoined
    | PeerLeft
    | PhaseChanged
    | Downloading
    | RoundStarted
    | StepDone
    | RoundCertified
    | Attested
    | MemberMetrics
    | RoundSummary
    | Rejected
    | Diverged
    | Resynchronised
    | CaughtUp
    | Checkpointed
    | AuditStarted
    | Audited
    | AuditEnded
    | PrivacySpent
    | Leaving
    | Left
    | Notice
    | RunFinished
)
