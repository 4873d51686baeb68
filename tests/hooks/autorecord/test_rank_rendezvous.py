"""All ranks train, or some never do: each rank gets the same answer, and none waits for ever."""

import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from geodiag.hooks.autorecord.rank_rendezvous import all_ranks_present, value_of_rank_0

SOON = timedelta(seconds=0.2)


@pytest.fixture
def me(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """Two ranks, which share a store, each in a thread; `me.rank` is this thread's."""
    store, me = dist.HashStore(), threading.local()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: me.rank)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)

    return me


@pytest.fixture
def of_two(me: threading.local) -> Callable[[int, timedelta], bool]:
    """`of_two(rank, timeout)`: the answer of one of the two ranks."""

    def answer_of(rank: int, timeout: timedelta) -> bool:
        me.rank = rank
        return all_ranks_present(timeout)

    return answer_of


def test_every_rank_gets_the_value_of_rank_0(me: threading.local) -> None:
    for me.rank, own in enumerate(("runs/first", "runs/second")):
        assert value_of_rank_0(own) == "runs/first"


def test_ranks_that_are_all_present_begin(of_two) -> None:
    answers: list[bool] = []
    other = threading.Thread(target=lambda: answers.append(of_two(1, timedelta(seconds=20))))
    other.start()
    answers.append(of_two(0, timedelta(seconds=20)))
    other.join()
    assert answers == [True, True]


def test_a_rank_whose_wait_timed_out_decides_for_the_late_one(of_two) -> None:
    assert not of_two(1, SOON)
    assert not of_two(0, SOON), "all are here by now, but one of them has gone on"


def test_a_single_process_waits_for_no_rank() -> None:
    assert all_ranks_present(timedelta(0))
