"""The registry: every metric that geodiag records, and the questions other modules ask about them.

Metrics are declared in gain_metrics.py, stream_metrics.py, expert_metrics.py, router_metrics.py and
step_metrics.py, in the order in which docs/metrics.md lists them.
"""

from collections.abc import Iterable, Set

from geodiag.metrics import expert_metrics, router_metrics, step_metrics
from geodiag.metrics.gain_metrics import GAIN_METRICS
from geodiag.metrics.metric import Group, Metric
from geodiag.metrics.stream_metrics import STREAM_METRICS

_DECLARED = [
    *step_metrics.OF_STEPS,
    *GAIN_METRICS,
    *STREAM_METRICS,
    *expert_metrics.OF_LAYERS,
    *router_metrics.OF_LAYERS,
    *router_metrics.OF_EXPERTS,
    *expert_metrics.OF_EXPERTS,
    *step_metrics.OF_TOKENS,
    *step_metrics.OF_DOMAINS,
]

METRICS: dict[tuple[str, str], Metric] = {(m.table, m.name): m for m in _DECLARED}
"""(table, name) → Metric."""

BY_KEY: dict[str, Metric] = {m.key: m for m in _DECLARED}
"""`table.name` → Metric."""

if len(BY_KEY) != len(_DECLARED):
    raise AssertionError("a metric is declared twice")

MATRICES = "matrices"
"""Key of the token-mean residual maps: a table without metrics, measured with the gains."""

_HEADINGS = {
    "Outcome": "Outcome",
    "Stage 1": "Stage 1: local curvature",
    "Stage 2": "Stage 2: routing instability",
    "Stage 3": "Stage 3: amplification",
}


def by_key(key: str) -> Metric:
    """Return the metric that `table.name` names. Raises KeyError for an unknown one."""
    if key not in BY_KEY:
        raise KeyError(f"no metric is registered as {key!r}; declare it in geodiag/metrics")
    return BY_KEY[key]


def keys_of(group: Group) -> frozenset[str]:
    """Return the keys of the metrics that are measured with `group`."""
    found = frozenset(m.key for m in _DECLARED if m.group == group)
    return found | {MATRICES} if group == "gains" else found


def due_groups(groups: Iterable[Group], due: Set[str]) -> frozenset[Group]:
    """Return those of `groups` of which some metric is due."""
    return frozenset(g for g in groups if not _KEYS[g].isdisjoint(due))


_KEYS: dict[Group, frozenset[str]] = {
    group: keys_of(group) for group in {m.group for m in _DECLARED} if group is not None
}


def headlines() -> dict[str, list[str]]:
    """Return heading → metrics of the one-screen summary, in `steps` or in `layers`."""
    return {
        heading: [m.name for m in _DECLARED if m.headline == section]
        for section, heading in _HEADINGS.items()
    }


def live() -> list[Metric]:
    """Return the metrics whose largest value is shown while a training runs."""
    return [m for m in _DECLARED if m.live]


def charted(page: str, table: str = "layers") -> list[Metric]:
    """Return the metrics of a table that a page draws, in the order of the registry."""
    return [m for m in _DECLARED if m.table == table and m.chart and m.chart.page == page]


def menu(page: str, table: str = "layers") -> dict[str, str]:
    """Return metric name → its entry in the menu of a page's large chart."""
    return {m.name: m.chart.menu for m in charted(page, table) if m.chart and m.chart.menu}


def panels(page: str) -> tuple[tuple[str, dict[str, str]], ...]:
    """Return the line charts of a page: for each its title, and metric name → the line's name."""
    found: dict[str, dict[str, str]] = {}
    for m in charted(page):
        if m.chart and m.chart.panel:
            found.setdefault(m.chart.panel, {})[m.name] = m.chart.legend or m.name
    return tuple(found.items())


def quantities(page: str) -> dict[str, tuple[str, dict[str, tuple[str, ...]]]]:
    """Return quantity → its menu entry, and how it is reduced over tokens → the metrics.

    Where a quantity has two metrics of one reduction, the first is forward, the second backward.
    """
    found: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {}
    for m in charted(page):
        if m.chart and m.chart.menu and m.chart.over:
            _, over = found.setdefault(m.chart.quantity or m.name, (m.chart.menu, {}))
            over[m.chart.over] = (*over.get(m.chart.over, ()), m.name)
    return found
