"""ReplayableLoader: the same batches after a rollback, none lost, none kept too long."""

from collections.abc import Iterator
from typing import Any

import pytest

from geodiag.hooks.snapshots.replayable_loader import ReplayableLoader


class Counting:
    """A loader that says where it stands and counts what it made."""

    def __init__(self, n: int = 100) -> None:
        self.n, self.at, self.made = n, 0, 0

    def __iter__(self) -> Iterator[int]:
        while self.at < self.n:
            self.at += 1
            self.made += 1
            yield self.at - 1

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def take(loader: ReplayableLoader, n: int) -> list[int]:
    return [next(loader) for _ in range(n)]


def test_a_rewound_loader_gives_the_same_batches_and_then_new_ones() -> None:
    loader = ReplayableLoader(iter(range(100)))
    assert take(loader, 8) == list(range(8))
    loader.rewind(3)
    assert take(loader, 8) == list(range(3, 11))


def test_a_loader_makes_each_batch_once_however_often_it_comes() -> None:
    source = Counting()
    loader = ReplayableLoader(source)
    for _ in range(3):
        loader.rewind(0)
        take(loader, 10)
    assert source.made == 10


def test_discarded_batches_are_not_kept() -> None:
    loader = ReplayableLoader(iter(range(100)))
    take(loader, 10)
    loader.discard(6)
    with pytest.raises(ValueError, match="from 5 on are no longer kept"):
        loader.rewind(5)
    loader.rewind(6)
    assert take(loader, 5) == [6, 7, 8, 9, 10]


def test_skipped_positions_are_passed_over_but_counted() -> None:
    loader = ReplayableLoader(iter(range(100)))
    take(loader, 10)
    loader.rewind(4)
    loader.skip(range(6, 9))
    assert take(loader, 4) == [4, 5, 9, 10]
    assert loader.position == 11
    loader.rewind(4)
    assert take(loader, 3) == [4, 5, 9], "another rewind does not bring them back"


def test_a_loader_at_its_end_continues_after_a_rewind() -> None:
    loader = ReplayableLoader(range(5))
    assert list(loader) == [0, 1, 2, 3, 4]
    loader.rewind(2)
    assert list(loader) == [2, 3, 4]


def test_queued_batches_are_not_yet_trained_on() -> None:
    loader = ReplayableLoader(iter(range(100)))
    take(loader, 10)
    assert (loader.next_to_train(0), loader.next_to_train(3)) == (10, 7)
    loader.rewind(2)
    loader.skip(range(4, 6))
    take(loader, 4)  # 2, 3, 6, 7
    assert (loader.next_to_train(0), loader.next_to_train(2), loader.next_to_train(3)) == (8, 6, 3)


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("marked", [0, 4, 7])
def test_a_resumed_loader_continues_at_its_position(knows: bool, marked: int) -> None:
    """By the loader's own place where it has one, else by running through the data."""

    def source() -> Any:
        return Counting() if knows else iter(range(100))

    loader = ReplayableLoader(source())
    for position in range(7):
        if position == marked:
            loader.mark()
        next(loader)
    if marked == 7:
        loader.mark()
    loader.skip(range(8, 10))
    state = loader.state_dict(0)
    assert state["mark"] == marked
    fresh = source()
    again = ReplayableLoader.resumed(fresh, state)
    assert take(again, 3) == [7, 10, 11] == take(loader, 3)
    if knows:
        assert fresh.made == 12 - marked


def test_a_loader_marked_during_a_replay_resumes_from_the_mark_before() -> None:
    loader = ReplayableLoader(Counting())
    loader.mark()
    take(loader, 9)
    loader.rewind(5)
    loader.mark()  # the source is at 9, so this is no mark
    state = loader.state_dict(0)
    assert (state["position"], state["mark"]) == (5, 0)
    assert take(ReplayableLoader.resumed(Counting(), state), 2) == [5, 6]


def test_data_that_end_before_the_place_to_resume_from_are_refused() -> None:
    loader = ReplayableLoader(iter(range(100)))
    take(loader, 9)
    with pytest.raises(
        ValueError, match="the data ends after 4 batches; pass the loader of the run"
    ):
        ReplayableLoader.resumed(iter(range(4)), loader.state_dict(0))
