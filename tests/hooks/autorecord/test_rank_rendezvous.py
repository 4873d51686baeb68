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
    """`of_two(rank, patience)`: the muster of one of the two."""

    def muster(rank: int, patience: timedelta) -> bool:
        me.rank = rank
        return all_ranks_present(patience)

    return muster


def test_the_first_ranks_word_is_everyones(me: threading.local) -> None:
    for me.rank, own in enumerate(("runs/first", "runs/second")):
        assert value_of_rank_0(own) == "runs/first"


def test_ranks_that_all_come_begin(of_two) -> None:
    said: list[bool] = []
    other = threading.Thread(target=lambda: said.append(of_two(1, timedelta(seconds=20))))
    other.start()
    said.append(of_two(0, timedelta(seconds=20)))
    other.join()
    assert said == [True, True]


def test_a_rank_that_waited_in_vain_decides_for_the_one_that_comes_late(of_two) -> None:
    assert not of_two(1, SOON)
    assert not of_two(0, SOON), "all are here by now, but one of them has gone on"


def test_a_process_alone_waits_for_nobody() -> None:
    assert all_ranks_present(timedelta(0))
