"""Rate limits: kept over any stretch of time, and shared fairly by peers however many streams they open."""

import threading
import time

from psyche.network.limits import BURST_SECONDS, QUANTUM, Limiter


def test_no_limit_takes_no_turn() -> None:
    Limiter(None).take("a", 1 << 40)


def take_all(limiter: Limiter, peer: str, quanta: int, taken: list[str]) -> None:
    for _ in range(quanta):
        limiter.take(peer, QUANTUM)
        taken.append(peer)


def test_no_more_passes_than_the_limit_allows() -> None:
    rate = 50.0 * QUANTUM
    limiter = Limiter(rate)
    began = time.monotonic()
    taken: list[str] = []
    take_all(limiter, "a", 40, taken)
    passed = time.monotonic() - began
    burst = max(rate * BURST_SECONDS, QUANTUM)
    assert rate * passed + burst >= 40 * QUANTUM


def test_many_streams_of_one_peer_get_no_more_than_the_one_of_another() -> None:
    limiter = Limiter(100.0 * QUANTUM)
    taken: list[str] = []
    greedy = [threading.Thread(target=take_all, args=(limiter, "greedy", 20, taken)) for _ in range(4)]
    modest = threading.Thread(target=take_all, args=(limiter, "modest", 20, taken))
    for thread in (*greedy, modest):
        thread.start()
    for thread in (*greedy, modest):
        thread.join()
    last = max(at for at, peer in enumerate(taken) if peer == "modest")
    assert taken[:last].count("greedy") <= 30, "by the time that one had its 20, the other four had about as many"
