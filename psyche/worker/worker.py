"""The worker: a replica and the network around it.

Training runs on a thread of its own, the network on the event loop; they meet where a round requires it. One round
reads top to bottom in ``Worker._take_part``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from psyche.audit.auditor import Auditor
from psyche.config import Node
from psyche.data.shard_prefetch import ShardPrefetcher
from psyche.data.token_store import BadShard
from psyche.diloco.local_data import PrivacyBudgetSpent
from psyche.diloco.replica import LocalUpdate, Replica, TrainingCancelled
from psyche.errors import PsycheError
from psyche.exchange.aggregation import Aggregation
from psyche.exchange.base import Exchange
from psyche.exchange.gather import Gather
from psyche.exchange.payload_journal import DIRECTORY as JOURNAL
from psyche.exchange.payload_journal import PayloadJournal
from psyche.exchange.payload_store import BlobRetention, PayloadLayout, PayloadStore
from psyche.exchange.rules import rules_of, update_limit
from psyche.exchange.sharded import Sharded
from psyche.ledger.chain_sync import serve_chain
from psyche.ledger.writer import LedgerWriter
from psyche.network.identity import Identity
from psyche.network.transport import Network, Refused
from psyche.numerics.aggregate import Gradient
from psyche.protocol.acceptor import Chain, plan_fault
from psyche.protocol.messages import Attestation, Certificate, Commitment, Hello, Plan, Promise, Record, RunStatus
from psyche.protocol.pacing import quota_fault
from psyche.protocol.round_state import Phase, Rules
from psyche.protocol.wire import decode
from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog
from psyche.training.engine_choice import describe_device
from psyche.worker.catchup import CatchUp, is_behind
from psyche.worker.coordinator_client import CoordinatorClient
from psyche.worker.leaving import GracefulLeave, LeaveRequest
from psyche.worker.node_state import NodeState
from psyche.worker.round_exchange import RoundClosed, RoundExchange
from psyche.worker.round_metrics import RoundReporter
from psyche.worker.training_thread import TrainingThread
from psyche.worker.voter import Voter


def needs_action(status: RunStatus, chain: Chain, rules: Rules) -> bool:
    """Return whether a node at ``chain`` has something to do: catch up with a state, take part in a round, or finish.

    A plan that the manifest does not allow is ignored: its record would get no vote.
    """
    if is_behind(status, chain) or status.phase == Phase.FINISHED:
        return True
    plan = status.plan
    return plan is not None and (quota_fault(plan, rules) or plan_fault(plan, chain)) is None


class Worker:
    """One volunteer node in a run, from joining to leaving."""

    def __init__(
        self,
        replica: Replica,
        settings: Node,
        directory: Path,
        identity: Identity,
        network: Network,
        log: EventLog,
        ledger: LedgerWriter,
        certificate: bytes | None = None,
        leave_request: LeaveRequest | None = None,
        prefetcher: ShardPrefetcher | None = None,
    ) -> None:
        """Wire the parts of a node together.

        ``certificate`` is the one of the last round applied, if the replica comes from a checkpoint; ``leave_request``
        is set when this node is to leave; ``prefetcher`` fetches the shards that are not on this disk.
        """
        self.replica, self.settings, self.directory = replica, settings, directory
        self.identity, self.network, self.log, self.ledger = identity, network, log, ledger
        self.manifest = replica.manifest
        coordinators = set(self.manifest.resolved.coordinators)
        network.prefer(lambda peer: peer in coordinators or peer in self.replica.chain.weights)
        self._stopping = False
        self._warned = ""
        self._voter = Voter(self.manifest, rules_of(self.manifest), directory, certificate)
        self._client = CoordinatorClient(self.manifest, identity, network.rpc, self, self._warn)
        deadlines = self.manifest.run.deadlines
        self._leave = GracefulLeave(leave_request or LeaveRequest(), self._client, deadlines, identity.peer_id, log)
        journal = PayloadJournal(directory / JOURNAL, self._warn)
        self._payload_store = PayloadStore(network, BlobRetention(network.blobs), journal, self._report_violation)
        self._prefetcher = prefetcher or ShardPrefetcher()
        self._trainer = TrainingThread(
            replica, settings.threads, self._leave, lambda: self._client.status, self._prefetcher, log
        )
        self._state = NodeState(
            replica,
            settings,
            directory,
            network=network,
            ledger=ledger,
            payload_store=self._payload_store,
            voter=self._voter,
            trainer=self._trainer,
            update_local=self._update_local,
            contact_seconds=lambda: self._client.contact_seconds,
            log=log,
        )
        self._catch_up = CatchUp(
            replica,
            settings,
            self._payload_store,
            voter=self._voter,
            client=self._client,
            state=self._state,
            exchange=self._exchange,
            log=log,
            warn=self._warn,
        )
        self._auditor = Auditor(
            replica,
            directory,
            network,
            self._client,
            ledger,
            self._prefetcher,
            do=self._trainer.do,
            log=log,
            warn=self._warn,
        )
        self._reporter = RoundReporter(replica, network, self._client, self._trainer, log)

    async def run(self) -> None:
        """Take part until the run is finished, or until this node was asked to leave and has submitted what it can.

        Cancelling it leaves the run at once.
        """
        backend = self.replica.backend
        self.log.emit(events.Notice(level="info", text=f"codecs are computed by {backend.name} ({backend.detail})"))
        for index in self._payload_store.journal.blobs:
            self._payload_store.serve(index)
        await self._catch_up.recover(self.ledger)
        await serve_chain(self.network, self.ledger)
        await self._auditor.serve()
        watching = asyncio.create_task(self._join())
        working = asyncio.create_task(self._rounds())
        leaving = asyncio.create_task(self._leave.run(working))
        try:
            await asyncio.wait({watching, working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            for task in (working, watching):
                if task.done():
                    task.result()
        except PsycheError:
            self._leave.failed = True
            raise
        finally:
            self._stopping = True
            for task in (leaving, watching, working):
                task.cancel()
            await asyncio.gather(leaving, watching, working, return_exceptions=True)
            for stop in (self._trainer.stop_overlap, self._trainer.stop_warm_up):
                with contextlib.suppress(PsycheError):  # the engine has failed, which was reported before
                    await stop()
            await self._auditor.close()
            await self._prefetcher.close()
            await self._leave.send_leave(self.replica.chain.rounds, finished=self._finished())
            self._leave.log_outcome()
            await self._trainer.close()

    async def _join(self) -> None:
        """Compile the model, then join the run and follow its status. No round waits for the compilation."""
        await self._trainer.compile(self.settings)
        await self._client.watch()

    # ------------------------------------------------------------------------------ between rounds

    async def _rounds(self) -> None:
        replica = self.replica
        if not is_behind(await self._client.until(lambda status: True), replica.chain):
            self._prefetcher.prefetch_from(replica.chain.position)
        while not self._leave.asked:
            if not self._finished():
                self.log.emit(events.PhaseChanged(round=replica.chain.rounds + 1, phase="waiting"))
            status = await self._client.until(lambda status: needs_action(status, replica.chain, self._voter.rules))
            await self._trainer.stop_overlap()
            self._auditor.check()
            if is_behind(status, replica.chain):
                await self._auditor.interrupt()
                await self._catch_up.synchronise(status)
                self._prefetcher.prefetch_from(replica.chain.position)
                if replica.chain.rounds and not is_behind(status, replica.chain):
                    self._trainer.start_warm_up()
            elif status.phase == Phase.FINISHED:
                break
            elif status.plan is not None:
                with contextlib.suppress(RoundClosed):
                    await self._take_part(status.plan)
                self._leave.end_round()
        await self._auditor.interrupt()
        await self._state.save(force=not self._leave.quickly)
        if not self._finished():
            return
        self.log.emit(events.RunFinished(rounds=replica.chain.rounds, reason="all rounds are done"))

    # ----------------------------------------------------------------- what CoordinatorClient asks of the node

    @property
    def term(self) -> int:
        """The term of the leader this node follows."""
        return self._voter.term

    def hello(self) -> Hello:
        """Return the message that introduces this node to a coordinator that does not know it."""
        chain = self.replica.chain
        seen = self._voter.certificate
        certificate = None if seen is None else decode(Certificate, seen)
        device = describe_device(self.settings, self.manifest.run.inner.optimizer)
        return Hello(chain.rounds, chain.head, chain.state_root, device, self._voter.claim, certificate)

    async def promise(self, term: int, claim: bytes) -> Promise:
        """Follow the leader of ``term``, who signed ``claim``."""
        return await self._voter.promise(term, claim, self.replica.chain.rounds)

    # ------------------------------------------------------------------------------------- a round

    async def _take_part(self, plan: Plan) -> None:
        """Take part in one round, from the plan to the attestation. Raises :class:`RoundClosed` if it closes before.

        A node that joined too late to be a member takes the outer step with the members, and so has the state that the
        next round starts from.
        """
        self._trainer.timer.start_round()
        self._payload_store.retention.next_round()
        self._voter.follows(plan)  # from here on, a coordinator that takes over continues this round
        update = None
        if (quota := plan.member(self.identity.peer_id)) is not None:
            members = tuple(member.node for member in plan.members)
            self.log.emit(events.RoundStarted(round=plan.round, members=members, inner_steps=quota.inner_steps))
            self._leave.begin_round(plan)
            await self._trainer.stop_warm_up()
            await self._auditor.interrupt()
            update = await self._train(plan)
            self._trainer.timer.start_exchange()
            self.log.emit(events.PhaseChanged(round=plan.round, phase="exchanging"))
        else:
            self._prefetcher.prefetch_after(plan)
            if not self._auditor.begin(plan.round):
                self.log.emit(events.PhaseChanged(round=plan.round, phase="following"))
        try:
            if update is not None and self.manifest.run.overlap.overlap_steps:
                self._trainer.start_overlap(plan)
            exchange = self._exchange(plan)
            record, gradient = await self._certify(plan, update, exchange)
        except RoundClosed as closed:
            await self._trainer.stop_overlap()
            if update is not None and not closed.accepted:
                await self._trainer.do(self.replica.restore_update, update)
            await self._trainer.do(self.replica.discard_local_steps)
            raise
        await self._state.apply(record, gradient)
        await self._auditor.follow(record)
        if update is not None and all(one.node != self.identity.peer_id for one in record.accepted):
            await self._trainer.do(self.replica.restore_update, update)
        self._trainer.timer.end_exchange()
        self._reporter.announce(record)
        leaves = self._leave.asked
        if leaves:  # before the last attestation, after which the coordinator plans the next round
            if quota is not None:
                await self._reporter.report(plan, update, evaluate=False)
            await self._leave.send_leave(plan.round, finished=self._finished())
        suspects = await self._auditor.find_suspects(
            record,
            exchange.layout.counts,
            {node: exchange.payloads[node] for node in exchange.held if node in exchange.payloads},
            exchange.needed_slices(),
        )
        try:
            await self._client.submit(Attestation(self.replica.chain.state_root, suspects), plan.round)
        except Refused:
            await self._client.send_hello()  # the round is over, the run is not
        self._leave.end_round(record)
        if quota is not None and not leaves:
            await self._reporter.report(plan, update)
        if not self._auditor.busy:
            await self._state.save()

    async def _certify(self, plan: Plan, update: LocalUpdate | None, exchange: Exchange) -> tuple[Record, Gradient]:
        """Exchange payloads and vote. Return the record and its outer gradient, or raise :class:`RoundClosed`."""
        return await RoundExchange(
            plan,
            update,
            self.replica.chain,
            voter=self._voter,
            client=self._client,
            exchange=exchange,
            has_base=partial(self.replica.verify_base_proof, plan),
            warn=self._warn,
        ).run()

    async def _train(self, plan: Plan) -> LocalUpdate | None:
        """Train and commit. Returns None if the round closed before, or this node could not train."""
        await self._prefetcher.wait_ready(plan, self.identity.peer_id, lambda: self._closed_to_me(plan))
        self.log.emit(events.PhaseChanged(round=plan.round, phase="training"))
        try:
            update = await self._trainer.train(plan, lambda: self._stopping or self._closed_to_me(plan))
        except TrainingCancelled:
            self._warn(f"round {plan.round} closed before this node finished training: its steps are lost")
            self._leave.end_round()
            return None
        except BadShard:
            self._warn(f"this node does not train in round {plan.round}: the shards assigned to it are missing here")
            self._leave.end_round()
            return None
        except PrivacyBudgetSpent as spent:
            self._warn(str(spent))
            self._leave.request_leave()
            self._leave.end_round()
            return None
        self._account_for(plan)
        self.log.emit(events.PhaseChanged(round=plan.round, phase="committing"))
        digest = update.contribution.commitment(self.identity.peer_id, self.manifest.run_id, plan.round)
        try:
            await self._client.submit(Commitment(digest, plan.term), plan.round)
        except Refused as refusal:
            self._warn(f"contribution rejected: {refusal}; it is kept as error feedback for the next round")
            self._leave.end_round()
        self._leave.record_commitment()
        return update

    def _account_for(self, plan: Plan) -> None:
        """Log the privacy budget spent. A node whose budget allows no further round leaves after this one."""
        if self.replica.private is None:
            return
        account = self.replica.private.account(plan.round)
        self.log.emit(account)
        if not account.rounds_left and plan.round < self.manifest.run.rounds.total:
            self._warn("the privacy budget allows no further round: this node leaves the run after this one")
            self._leave.request_leave()

    def _exchange(self, plan: Plan) -> Exchange:
        """Return this node's side of the exchange of a round's payloads."""
        counts = tuple(part.stop - part.start for part in self.replica.slices_of(plan.round))
        run = self.manifest.run
        layout = PayloadLayout(self.replica.codec, counts, update_limit(run))
        aggregation = Aggregation.of(run)
        if plan.is_sharded:
            return Sharded(self._payload_store, plan, layout, aggregation, self.replica.backend.codec(run.result_codec))
        return Gather(self._payload_store, plan, layout, aggregation)

    # -------------------------------------------------------------------------------------- helpers

    async def _update_local(self, function: Callable[[], None]) -> None:
        """Change x on the training thread, or here while an audit has the engine: there is no x to move then."""
        await (asyncio.to_thread(function) if self._auditor.busy else self._trainer.do(function))

    def _closed_to_me(self, plan: Plan) -> bool:
        status = self._client.status
        if status is None or status.phase == Phase.ELECTING:
            return False
        return status.plan != plan or status.phase == Phase.CERTIFYING

    def _report_violation(self, peer_id: str, what: str) -> None:
        self.log.emit(events.Rejected(peer=peer_id, reason=what, what="blob"))

    def _finished(self) -> bool:
        return self.replica.chain.rounds >= self.manifest.run.rounds.total

    def _warn(self, text: str) -> None:
        if text != self._warned:  # a warning that repeats every second is logged once
            self._warned = text
            self.log.emit(events.Notice(level="warning", text=text))
