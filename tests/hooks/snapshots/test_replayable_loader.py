"""The tape: the same batches again after going back, none lost, none kept longer than needed."""

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


def take(tape: ReplayableLoader, n: int) -> list[int]:
    return [next(tape) for _ in range(n)]


def test_a_rewound_tape_gives_the_same_batches_and_then_new_ones() -> None:
    tape = ReplayableLoader(iter(range(100)))
    assert take(tape, 8) == list(range(8))
    tape.rewind(3)
    assert take(tape, 8) == list(range(3, 11))


def test_a_loader_makes_each_batch_once_however_often_it_comes() -> None:
    loader = Counting()
    tape = ReplayableLoader(loader)
    for _ in range(3):
        tape.rewind(0)
        take(tape, 10)
    assert loader.made == 10


def test_what_nobody_comes_back_to_is_not_kept() -> None:
    tape = ReplayableLoader(iter(range(100)))
    take(tape, 10)
    tape.discard(6)
    with pytest.raises(ValueError, match="from 5 on are no longer kept"):
        tape.rewind(5)
    tape.rewind(6)
    assert take(tape, 5) == [6, 7, 8, 9, 10]


def test_positions_that_are_left_out_are_passed_over_but_counted() -> None:
    tape = ReplayableLoader(iter(range(100)))
    take(tape, 10)
    tape.rewind(4)
    tape.skip(range(6, 9))
    assert take(tape, 4) == [4, 5, 9, 10]
    assert tape.position == 11
    tape.rewind(4)
    assert take(tape, 3) == [4, 5, 9], "going back once more does not bring them back"


def test_a_tape_at_its_end_goes_on_after_it_is_rewound() -> None:
    tape = ReplayableLoader(range(5))
    assert list(tape) == [0, 1, 2, 3, 4]
    tape.rewind(2)
    assert list(tape) == [2, 3, 4]


def test_what_is_handed_out_and_still_waits_is_not_yet_consumed() -> None:
    tape = ReplayableLoader(iter(range(100)))
    take(tape, 10)
    assert (tape.next_to_train(0), tape.next_to_train(3)) == (10, 7)
    tape.rewind(2)
    tape.skip(range(4, 6))
    take(tape, 4)  # 2, 3, 6, 7
    assert (tape.next_to_train(0), tape.next_to_train(2), tape.next_to_train(3)) == (8, 6, 3)


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("marked", [0, 4, 7])
def test_a_resumed_tape_goes_on_where_it_stood(knows: bool, marked: int) -> None:
    """By the loader's own place where it has one, else by running through the data."""

    def source() -> Any:
        return Counting() if knows else iter(range(100))

    tape = ReplayableLoader(source())
    for position in range(7):
        if position == marked:
            tape.mark()
        next(tape)
    if marked == 7:
        tape.mark()
    tape.skip(range(8, 10))
    state = tape.state_dict(0)
    assert state["mark"] == marked
    fresh = source()
    again = ReplayableLoader.resumed(fresh, state)
    assert take(again, 3) == [7, 10, 11] == take(tape, 3)
    if knows:
        assert fresh.made == 12 - marked


def test_a_tape_marked_while_it_repeats_resumes_from_the_mark_before() -> None:
    tape = ReplayableLoader(Counting())
    tape.mark()
    take(tape, 9)
    tape.rewind(5)
    tape.mark()  # the loader stands at 9, so this is no mark
    state = tape.state_dict(0)
    assert (state["position"], state["mark"]) == (5, 0)
    assert take(ReplayableLoader.resumed(Counting(), state), 2) == [5, 6]


def test_data_that_end_before_the_place_to_resume_from_are_refused() -> None:
    tape = ReplayableLoader(iter(range(100)))
    take(tape, 9)
    with pytest.raises(
        ValueError, match="the data ends after 4 batches; pass the loader of the run"
    ):
        ReplayableLoader.resumed(iter(range(4)), tape.state_dict(0))
