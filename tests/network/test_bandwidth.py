"""Rate limits hold over any period and are shared fairly by peers, however many streams they open."""

import threading
import time
from types import SimpleNamespace

import pytest

from psyche.network import bandwidth
from psyche.network.bandwidth import BURST_SECONDS, QUANTUM, Limiter


def test_without_a_limit_nothing_waits() -> None:
    Limiter(None).take("a", 1 << 40)


def take_all(limiter: Limiter, peer: str, quanta: int, taken: list[str]) -> None:
    for _ in range(quanta):
        limiter.take(peer, QUANTUM)
        taken.append(peer)


def test_the_rate_never_exceeds_the_limit() -> None:
    rate = 50.0 * QUANTUM
    limiter = Limiter(rate)
    began = time.monotonic()
    taken: list[str] = []
    take_all(limiter, "a", 40, taken)
    passed = time.monotonic() - began
    burst = max(rate * BURST_SECONDS, QUANTUM)
    assert rate * passed + burst >= 40 * QUANTUM


def test_many_streams_of_one_peer_get_no_more_than_a_single_stream_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes only while all threads wait, so the thread schedule does not matter."""
    now = [0.0]
    monkeypatch.setattr(bandwidth, "time", SimpleNamespace(monotonic=lambda: now[0]))
    limiter = Limiter(float(QUANTUM))
    taken: list[str] = []
    greedy = [threading.Thread(target=take_all, args=(limiter, "greedy", 20, taken)) for _ in range(4)]
    modest = threading.Thread(target=take_all, args=(limiter, "modest", 20, taken))
    threads = (*greedy, modest)
    for thread in threads:
        thread.start()
    for passed in range(100):
        while len(taken) < passed or sum(limiter._waiting.values()) < sum(thread.is_alive() for thread in threads):
            time.sleep(0.0005)
        with limiter._turn:
            now[0] += 1.0  # a second's worth is one QUANTUM
            limiter._turn.notify_all()
    for thread in threads:
        thread.join()
    last = max(at for at, peer in enumerate(taken) if peer == "modest")
    assert 19 <= taken[:last].count("greedy") <= 20, (
        "when the single stream had its 20, the other four together had as many"
    )
