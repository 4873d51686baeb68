"""One rule for several ranks: the function, `Run.read`, the dashboard and the cascade agree.

Every ordered triple of {1, 4, NaN, null, inf, -inf} is a step of a run of three ranks.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from geodiag import open_run
from geodiag.anomaly.series_window import read_series
from geodiag.dashboard.data.run_cache import RunCache
from geodiag.metrics.schema import METRICS
from geodiag.run import Run
from geodiag.store.merge_ranks import reduce_over_ranks

# R ranks, S steps.

Value = float | None
Worse = Literal["high", "low"] | None

NAN, INF, NULL = math.nan, math.inf, None
RULES = ("mean", "sum", "max", "min", "last")
WORSE: tuple[Worse, ...] = ("high", "low", None)
TRIPLES = list(itertools.product((1.0, 4.0, NAN, NULL, INF, -INF), repeat=3))
"""The mean of any of them is exact in float32, so that nothing is compared within a tolerance."""

EXAMPLES = [
    # values of three ranks     mean   sum   max   min  last
    ((1.0, NULL, 3.0), (2.0, 4.0, 3.0, 1.0, 1.0)),
    ((NULL, 3.0, 1.0), (2.0, 4.0, 3.0, 1.0, 3.0)),
    ((3.0, 1.0, 5.0), (3.0, 9.0, 5.0, 1.0, 3.0)),
    ((NULL, NULL, NULL), (NULL,) * 5),
    ((1.0, NAN, 3.0), (NAN,) * 5),
    ((1.0, NAN, INF), (NAN,) * 5),
    ((1.0, INF, 3.0), (INF,) * 5),
    ((1.0, -INF, NULL), (-INF,) * 5),
]


def by_hand(values: Sequence[Value], rule: str, worse: Worse) -> Value:
    """The definition, one value after another, in Python's float64; None is a null."""
    sampled = [v for v in values if v is not None]
    if not sampled:
        return None
    if any(math.isnan(v) for v in sampled):
        return NAN
    bad_end = -INF if worse == "low" else INF
    for infinity in (bad_end, -bad_end):
        if infinity in sampled:
            return infinity
    if rule == "last":
        return sampled[0]
    if rule in ("max", "min"):
        return sorted(sampled)[-1 if rule == "max" else 0]
    total = 0.0
    for value in sampled:
        total += value
    return total if rule == "sum" else total / len(sampled)


def reduced(values: Sequence[Sequence[Value]], rule: str, worse: Worse) -> list[Value]:
    """`reduce_over_ranks` of one triple a step."""
    data_RS = np.array([[7.0 if v is None else v for v in row] for row in values], np.float32).T
    mask_RS = np.array([[v is None for v in row] for row in values]).T
    out_S = reduce_over_ranks(np.ma.MaskedArray(data_RS, mask_RS), rule, worse)  # type: ignore[arg-type]
    assert out_S.dtype == np.float32
    data_S, mask_S = np.ma.getdata(out_S), np.ma.getmaskarray(out_S)
    return [None if m else float(v) for v, m in zip(data_S, mask_S, strict=True)]


def differ(left: Sequence[Value], right: Sequence[Value]) -> list[int]:
    """The places at which two lists of values are not the same; NaN is the same as NaN."""
    pairs = enumerate(zip(left, right, strict=True))
    return [i for i, (a, b) in pairs if not (a == b or (a != a and b != b))]


@pytest.mark.parametrize(("values", "expected"), EXAMPLES)
def test_examples_written_out(values: tuple[Value, ...], expected: tuple[Value, ...]) -> None:
    for rule, value in zip(RULES, expected, strict=True):
        assert not differ(reduced([values], rule, "high"), [value]), rule
        assert not differ([by_hand(values, rule, "high")], [value]), rule


def test_of_two_infinities_the_one_at_the_bad_end_is_the_answer() -> None:
    for rule in RULES:
        assert reduced([(INF, -INF, 1.0)], rule, "high") == [INF]
        assert reduced([(INF, -INF, 1.0)], rule, "low") == [-INF]


@pytest.mark.parametrize("worse", WORSE)
@pytest.mark.parametrize("rule", RULES)
def test_the_function_follows_the_definition(rule: str, worse: Worse) -> None:
    expected = [by_hand(t, rule, worse) for t in TRIPLES]
    assert not differ(reduced(TRIPLES, rule, worse), expected)


def _nan_takes_no_part(values: Sequence[Value], rule: str, worse: Worse) -> Value:
    return by_hand([None if v is not None and math.isnan(v) else v for v in values], rule, worse)


def _null_is_zero(values: Sequence[Value], rule: str, worse: Worse) -> Value:
    return by_hand([0.0 if v is None else v for v in values], rule, worse)


def _last_is_the_mean(values: Sequence[Value], rule: str, worse: Worse) -> Value:
    return by_hand(values, "mean" if rule == "last" else rule, worse)


def _infinities_take_no_part(values: Sequence[Value], rule: str, worse: Worse) -> Value:
    return by_hand([None if v in (INF, -INF) else v for v in values], rule, worse)


@pytest.mark.parametrize(
    ("wrong", "rules"),
    [
        (_nan_takes_no_part, RULES),
        (_null_is_zero, RULES),
        (_last_is_the_mean, ("last",)),
        (_infinities_take_no_part, RULES),
    ],
)
def test_wrong_definitions_are_noticed(wrong: Callable[..., Value], rules: tuple[str, ...]) -> None:
    for rule in rules:
        assert differ(reduced(TRIPLES, rule, "high"), [wrong(t, rule, "high") for t in TRIPLES])


def test_a_plain_array_is_sampled_everywhere() -> None:
    merged_S = reduce_over_ranks(np.array([[1.0, NAN], [3.0, 2.0]]), "max", "high")
    assert not np.ma.getmaskarray(merged_S).any()
    assert np.array_equal(np.ma.getdata(merged_S), [3.0, NAN], equal_nan=True)


def test_a_sum_that_float32_cannot_hold_is_infinite() -> None:
    assert reduced([(3e38, 3e38, NULL)], "sum", "high") == [INF]
    assert reduced([(3e38, 3e38, NULL)], "mean", "high") == [float(np.float32(3e38))]


# -- the three readers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three ranks: a triple a step, in `layers` and in `steps`."""
    folder = tmp_path_factory.mktemp("ranks") / "run"
    steps = np.arange(len(TRIPLES))
    for rank in range(3):
        run = Run.create(folder, rank=rank, world_size=3, attempt=0 if rank else None)
        mine = [t[rank] for t in TRIPLES]
        values = np.ma.MaskedArray(
            np.array([7.0 if v is None else v for v in mine], np.float32),
            [v is None for v in mine],
        )
        run.append("steps", {"step": steps, "data_shift": values})
        run.append("layers", {"step": steps, "layer": 0, "site": "ffn", "max_vio": values})
        run.close()
    return folder


def _as_the_page(value: Value, worse: Worse) -> float:
    """A grid holds null as NaN, and what is not finite at the bad end."""
    if value is None:
        return NAN
    bad_end = -INF if worse == "low" else INF
    return value if math.isfinite(value) else bad_end


def _as_the_cascade(value: Value) -> float:
    """A window holds null as NaN, and NaN as infinite."""
    if value is None:
        return NAN
    return INF if math.isnan(value) else value


@pytest.mark.parametrize("worse", WORSE)
@pytest.mark.parametrize("rule", RULES)
def test_all_readers_follow_the_definition(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, rule: str, worse: Worse
) -> None:
    for key in (("layers", "max_vio"), ("steps", "data_shift")):
        monkeypatch.setitem(METRICS, key, replace(METRICS[key], ranks=rule, worse=worse))
    run = open_run(recorded)
    expected = [by_hand(t, rule, worse) for t in TRIPLES]

    for table, name in (("layers", "max_vio"), ("steps", "data_shift")):
        rows = run.read_arrow(table, ["step", name], ranks="merged")
        assert rows["step"].to_pylist() == list(range(len(TRIPLES)))
        assert not differ(rows[name].to_pylist(), expected), f"Run.read of {table}"

    on_page = [_as_the_page(v, worse) for v in expected]
    cache = RunCache(run)
    (grid,) = cache.grids("layers", "max_vio")
    assert not differ(grid.values_RS[0].tolist(), on_page)
    assert not differ(cache.steps()["data_shift"].tolist(), on_page)

    in_cascade = [_as_the_cascade(v) for v in expected]
    window = read_series(run, 0, len(TRIPLES) - 1)
    at = next(i for i, s in enumerate(window.series) if s.metric == "max_vio")
    assert not differ(window.values_SP[:, at].tolist(), in_cascade)
    assert not differ(window.outcome["data_shift"].tolist(), in_cascade)


def test_rows_that_ranks_do_not_share_are_merged_in_order(tmp_path: Path) -> None:
    first = {"step": [0, 0, 1], "layer": [0, 1, 0], "site": ["ffn"] * 3, "max_vio": [1.0, 2.0, 3.0]}
    second = {
        "step": [0, 1, 1],
        "layer": [1, 1, 0],
        "site": ["ffn"] * 3,
        "max_vio": [9.0, 5.0, 8.0],
    }
    for rank, columns in enumerate((first, second)):
        run = Run.create(tmp_path / "run", rank=rank, world_size=2, attempt=0 if rank else None)
        run.append("layers", columns)
        run.close()
    rows = open_run(tmp_path / "run").read_arrow("layers", ranks="merged")
    # `max_vio` has the rule `last`: the value of the first rank that sampled.
    assert METRICS["layers", "max_vio"].ranks == "last"
    columns = [rows[n].to_pylist() for n in ("rank", "step", "layer", "max_vio")]
    assert list(zip(*columns, strict=True)) == [
        (0, 0, 0, 1.0),
        (0, 0, 1, 2.0),
        (0, 1, 0, 3.0),
        (1, 1, 1, 5.0),
    ]
