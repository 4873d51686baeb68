"""Ranks that come together, and ranks of which some never come: each learns the same, and none
waits for ever.
"""

import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch.distributed as dist

from geodiag.hooks.autorecord.rank_rendezvous import all_here, before_they_part, of_the_first

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
        return all_here(patience)

    return muster


def test_the_first_ranks_word_is_everyones(me: threading.local) -> None:
    for me.rank, own in enumerate(("runs/first", "runs/second")):
        assert of_the_first(own) == "runs/first"


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
    assert all_here(timedelta(0))


def test_the_call_comes_before_all_groups_end_and_not_when_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[object] = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda group=None: said.append(group))
    before_they_part(lambda: said.append("call"))
    dist.destroy_process_group()
    dist.destroy_process_group("one of them")
    assert said == ["call", None, "one of them"]
