"""The state of a page as its query string, so that every view has an address."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

from geodiag.dashboard.data.grid import row_name
from geodiag.metrics.schema import SITES


@dataclass(frozen=True, kw_only=True)
class View:
    """The choices of the reader; None means the default of the page.

    Invalid values in an address are ignored.
    """

    steps: tuple[int, int] | None = None
    """The range of steps on every time axis; None for all."""
    step: int | None = None
    """The step at which profiles and matrices are drawn."""
    site: tuple[int, int] | None = None
    """(layer, site index), written `3.ffn`."""
    layer: int | None = None
    metric: str | None = None
    over: str | None = None
    """How a gain is reduced over tokens: mean, max, min, of_mean."""
    scale: str | None = None
    """`log` for a logarithmic loss axis."""
    spike: int | None = None
    """The step whose cascade is shown: the onset of a spike, an early warning, or another."""
    stage: int | None = None
    """1, 2 or 3; together with `layer` and `step` a cell of the stage map."""

    @classmethod
    def parse(cls, search: str | None) -> "View":
        """Return the view of a query string such as `?steps=100-200&site=3.ffn`."""
        given = dict(parse_qsl((search or "").lstrip("?")))
        known: dict[str, Any] = {
            f.name: _READ[f.name](given[f.name]) for f in fields(cls) if f.name in given
        }
        return cls(**{k: v for k, v in known.items() if v is not None})

    def query_string(self) -> str:
        """Return the query string; `""` for a view without choices."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        text = {k: _WRITE.get(k, str)(v) for k, v in values.items() if v is not None}
        return f"?{urlencode(text)}" if text else ""

    def replaced(self, **changes: Any) -> "View":
        """Return a copy of the view with some choices changed."""
        return replace(self, **changes)

    @property
    def low(self) -> int | None:
        return self.steps[0] if self.steps else None

    @property
    def high(self) -> int | None:
        return self.steps[1] if self.steps else None


def apply_zoom(view: View, relayout: dict | None) -> View:
    """Return the view after a drag or a double click on a chart (Plotly's `relayoutData`)."""
    for key, value in (relayout or {}).items():
        if not key.startswith("xaxis"):
            continue
        if key.endswith(".autorange") and value:
            return view.replaced(steps=None)
        axis = key.split(".")[0]
        both = (
            value
            if key.endswith(".range")
            else [relayout.get(f"{axis}.range[{i}]") for i in (0, 1)]  # type: ignore[union-attr]
        )
        if ".range" in key and isinstance(both, list) and None not in both:
            low, high = sorted((max(0, round(float(both[0]))), max(0, round(float(both[1])))))
            return view.replaced(steps=(low, max(high, low + 1)))
    return view


def _read_range(text: str) -> tuple[int, int] | None:
    low, _, high = text.partition("-")
    a, b = _read_int(low), _read_int(high)
    return (a, b) if a is not None and b is not None and a < b else None


def _read_site(text: str) -> tuple[int, int] | None:
    layer, _, site = text.partition(".")
    number = _read_int(layer)
    return (number, SITES.index(site)) if number is not None and site in SITES else None


def _read_int(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _read_word(text: str) -> str | None:
    return text if text.replace("_", "").isalnum() and len(text) < 64 else None


_READ: dict[str, Callable[[str], Any]] = {
    "steps": _read_range,
    "step": _read_int,
    "site": _read_site,
    "layer": _read_int,
    "metric": _read_word,
    "over": _read_word,
    "scale": _read_word,
    "spike": _read_int,
    "stage": lambda text: int(text) if text in ("1", "2", "3") else None,
}
_WRITE: dict[str, Callable[[Any], str]] = {"steps": lambda r: f"{r[0]}-{r[1]}", "site": row_name}
