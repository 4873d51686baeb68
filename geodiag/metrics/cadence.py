"""Cadence: which metric is recorded at which steps, and of which layers."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from geodiag.defaults import PROBE_EVERY
from geodiag.errors import GeodiagError
from geodiag.metrics.schema import METRICS

_OF_PROBES = {"matrices": PROBE_EVERY}
"""Tables without metrics of their own."""

Every = int | Mapping[str, int]
"""Steps between samples: of everything, or by the beginning of a metric's name ("" for all others).
"""


@dataclass(frozen=True)
class Cadence:
    """Steps between samples of each "table.metric"; the layers on record, None for all."""

    every: Mapping[str, int]
    layers: tuple[int, ...] | None = None
    _seen: dict[tuple[bool, ...], frozenset[str]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @classmethod
    def of(
        cls, every: Every = 1, probe_every: int = PROBE_EVERY, layers: tuple[int, ...] | None = None
    ) -> "Cadence":
        """Return the cadence that a user requested, on top of the defaults.

        GeodiagError for a prefix that no metric begins with.
        """
        asked = {"": every} if isinstance(every, int) else dict(every)
        if min([probe_every, *asked.values()]) < 1:
            raise ValueError("every and probe_every are at least 1")
        plain = asked.pop("", 1)
        steps = {
            name: plain if n == 1 else max(1, n * probe_every // PROBE_EVERY)
            for name, n in _defaults().items()
        }
        for prefix in sorted(asked, key=len):  # the longest prefix comes last, and wins
            for name in _begin_with(prefix, list(steps)):
                steps[name] = asked[prefix]
        return cls(steps, layers)

    @classmethod
    def of_run(cls, manifest: Mapping[str, Any]) -> "Cadence":
        """Return the cadence in a run's manifest, or the defaults where it has none."""
        config = manifest.get("config")
        written = config.get("cadence") if isinstance(config, dict) else None
        if not isinstance(written, dict) or not isinstance(written.get("every"), dict):
            return cls.of()
        layers = written.get("layers")
        return cls(
            _defaults() | written["every"], tuple(layers) if isinstance(layers, list) else None
        )

    def record(self) -> dict[str, Any]:
        """Return the cadence as data for the manifest."""
        return {
            "every": dict(self.every),
            "layers": None if self.layers is None else list(self.layers),
        }

    def due(self, step: int) -> frozenset[str]:
        """Return the "table.metric" names sampled at `step`; the same object for the same set."""
        periods = sorted(set(self.every.values()))
        key = tuple(step % p == 0 for p in periods)
        if key not in self._seen:
            now = {p for p, is_due in zip(periods, key, strict=True) if is_due}
            self._seen[key] = frozenset(name for name, p in self.every.items() if p in now)
        return self._seen[key]

    def watches(self, layer: int) -> bool:
        """Whether a layer is on record."""
        return self.layers is None or layer in self.layers


def _defaults() -> dict[str, int]:
    sampled = {
        f"{table}.{name}": m.every for (table, name), m in METRICS.items() if table != "steps"
    }
    return sampled | _OF_PROBES


def _begin_with(prefix: str, names: Sequence[str]) -> list[str]:
    found = [n for n in names if n == prefix or n.startswith(f"{prefix}.")]  # a table
    found = found or [
        n for n in names if n.startswith(prefix) or n.partition(".")[2].startswith(prefix)
    ]
    if found:
        return found
    if any(table == "steps" and name.startswith(prefix) for table, name in METRICS):
        raise GeodiagError(
            f"{prefix!r} has no cadence: the table steps has a row of every step; leave it out"
        )
    near = difflib.get_close_matches(prefix, [n.partition(".")[2] or n for n in names], 1, 0.4)
    hint = f"did you mean {near[0]}?" if near else "docs/metrics.md lists them"
    raise GeodiagError(f"no metric begins with {prefix!r}; {hint}")


def parse_every(given: Iterable[str]) -> dict[str, int]:
    """Return command-line words, `10` or `amax_gain=1`, as a mapping. GeodiagError for others."""
    out: dict[str, int] = {}
    for word in given:
        name, _, number = word.rpartition("=")
        if not number.isdecimal() or int(number) < 1 or (not name and "=" in word):
            raise GeodiagError(
                f"--every {word} is no cadence; "
                "pass a number of steps, or METRIC=STEPS, e.g. amax_gain=1"
            )
        out[name] = int(number)
    return out


def parse_layers(given: str | Iterable[int] | None, count: int) -> tuple[int, ...] | None:
    """Return `0-7,30-`, or numbers, as layers of a model with `count` layers.

    GeodiagError for a layer that the model does not have.
    """
    if given is None:
        return None
    fix = f"pass some of 0 to {count - 1}, e.g. 0-{min(3, count - 1)}"
    try:
        wanted = _numbers(given, count) if isinstance(given, str) else {int(n) for n in given}
    except ValueError:
        raise GeodiagError(f"{given!r} names no layers; {fix}") from None
    absent = sorted(n for n in wanted if not 0 <= n < count)
    if absent or not wanted:
        raise GeodiagError(
            f"the model has no layer {absent[0]}; {fix}"
            if absent
            else f"no layers are named; {fix}"
        )
    return tuple(sorted(wanted))


def _numbers(text: str, count: int) -> set[int]:
    found: set[int] = set()
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        low = int(first)
        high = low if not dash else int(last) if last.strip() else max(low, count - 1)
        if high < low:
            raise ValueError(piece)
        found |= set(range(low, high + 1))
    return found
