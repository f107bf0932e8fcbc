"""Calls that overlap: results in order, errors where they belong, an end in good order."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import pytest

from patchcl_qupath.overlap import Stop, StoppedError, mapped, meanwhile, overlapped, turns


@pytest.mark.parametrize("at_once", [1, 3])
def test_results_come_in_order_and_errors_with_their_item(at_once: int) -> None:
    def call(item: int) -> int:
        time.sleep(0.002 * (7 - item))  # later items are done earlier
        if item == 3:
            raise ValueError("three")
        return item * item

    futures = list(overlapped(call, range(7), at_once, Stop()))
    with pytest.raises(ValueError, match="three"):
        futures[3].result()
    others = [future.result() for k, future in enumerate(futures) if k != 3]
    assert others == [0, 1, 4, 16, 25, 36]


def test_so_many_are_under_way_and_no_more() -> None:
    lock, now, most = threading.Lock(), 0, 0
    meet = threading.Barrier(3, timeout=10)  # three at once, or it breaks

    def call(_: int) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        meet.wait()
        time.sleep(0.005)
        with lock:
            now -= 1

    for future in overlapped(call, range(9), 3, Stop()):
        future.result()
    assert most == 3


@pytest.mark.parametrize("kind", ["an error", "Ctrl-C", "an early end"])
def test_who_ends_before_the_last_stops_the_others_and_waits_for_them(kind: str) -> None:
    stop, ended, begun = Stop(), [], []

    def call(item: int) -> None:
        begun.append(item)
        if item:
            try:
                while True:
                    stop.check()
                    time.sleep(0.001)
            finally:
                ended.append(item)

    def use() -> None:
        with closing(overlapped(call, range(100), 4, stop)) as results:
            next(results).result()
            while len(begun) < 4:
                time.sleep(0.001)
            if kind != "an early end":
                raise KeyboardInterrupt if kind == "Ctrl-C" else ValueError

    if kind == "an early end":
        use()
    else:
        with pytest.raises((KeyboardInterrupt, ValueError)):
            use()
    assert sorted(ended) == sorted(set(begun) - {0})
    assert len(begun) <= 8
    with pytest.raises(StoppedError):
        stop.check()


def test_an_end_after_the_last_stops_nothing() -> None:
    stop = Stop()
    assert [future.result() for future in overlapped(abs, [-1, 2], 2, stop)] == [1, 2]
    stop.check()


@pytest.mark.parametrize("cores", [1, 3])
def test_calls_on_all_cores_are_a_map(monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    monkeypatch.setattr("dask.system.cpu_count", lambda: cores)
    meet = threading.Barrier(cores, timeout=10)  # as many calls at once
    assert len({*mapped(lambda _: meet.wait(), range(cores))}) == cores
    assert [*mapped(pow, [2, 3, 4], [3, 2, 1])] == [8, 9, 4]
    assert [*mapped(pow, [], [])] == []
    with pytest.raises(ZeroDivisionError):
        [*mapped(lambda a: 1 / a, [1, 0, 2])]
    with pytest.raises(ValueError, match="zip"):
        [*mapped(pow, [1, 2], [1])]


def test_a_call_is_made_meanwhile_and_has_ended_with_the_block() -> None:
    meet, ended = threading.Barrier(2, timeout=10), []

    def call(item: int) -> None:
        meet.wait()  # while the block runs, or it breaks
        time.sleep(0.01)
        ended.append(item)

    with meanwhile(call, 3):
        meet.wait()
    assert ended == [3]


def test_a_call_meanwhile_is_waited_for_when_the_block_fails() -> None:
    ended = []

    def call() -> None:
        time.sleep(0.05)
        ended.append(True)

    with pytest.raises(ValueError, match="block"), meanwhile(call):
        raise ValueError("block")
    assert ended == [True]


def test_errors_of_a_call_meanwhile_come_after_those_of_the_block() -> None:
    done = []
    with pytest.raises(ZeroDivisionError), meanwhile(lambda: 1 / 0):
        done.append("block")
    assert done == ["block"]
    with pytest.raises(ValueError, match="block"), meanwhile(lambda: 1 / 0):
        raise ValueError("block")


def test_a_turn_comes_after_all_those_before_it() -> None:
    """Those between may be over at once: their image failed, or there is nothing to do."""
    first, second, third, fourth = turns(4)
    second.pass_on()
    third.pass_on()
    stop = Stop()
    stop.set()
    with pytest.raises(StoppedError):
        fourth.wait(stop)
    first.pass_on()
    fourth.wait(stop)
