"""MetricGroup: which function measures which metric.

A metric is two things: a declaration in geodiag/metrics, and a function here, by its group's file:

    @ROUTERS.per_token("layers.router_entropy")
    def router_entropy(seen: RouterBatch) -> Tensor:  # (P, T)
        return formulas.entropy(seen.scores_PTE)

The declaration's `micro` reduction does the rest: values of tokens become one value a place, and
micro-batches are weighted by their tokens. A test compares the functions with the registry.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from geodiag.hooks.adapters.base import StatsRows
from geodiag.hooks.measure.step_values import Values
from geodiag.metrics.metric import Group
from geodiag.metrics.registry import by_key

# P places (sites, routers, …) of one batch, T tokens, W columns

Result = TypeVar("Result")


class MetricGroup:
    """The measuring functions of one group of metrics."""

    def __init__(self, name: Group) -> None:
        self.name = name
        self._mean_columns: dict[str, Callable[[Any], Tensor | None] | None] = {}
        self._extreme_columns: dict[str, Callable[[Any], Tensor | None] | None] = {}
        """Metric → its function, None where only a kernel fills the column."""
        self._per_step: dict[tuple[str, ...], Callable[[Any], Any]] = {}
        self._measured: set[str] = set()
        self._key_of_column: dict[str, str] = {}
        self._lowest: frozenset[str] = frozenset()

    # -- declaring ---------------------------------------------------------------------------

    def per_token(
        self, key: str
    ) -> Callable[[Callable[[Any], Tensor | None]], Callable[[Any], Tensor | None]]:
        """Register a function of one micro-batch's tensors, places stacked.

        It returns (P, T), one value a place and token; or (P, T') of the sampled tokens, whose mean
        stands for all; or None where the metric does not apply.
        """

        def register(function: Callable[[Any], Tensor | None]) -> Callable[[Any], Tensor | None]:
            self._add_column(key, function)
            self._claim(key)
            return function

        return register

    def from_kernel(self, key: str) -> None:
        """Reserve a column that a model's kernel may fill; a `per_step` function reads it."""
        self._add_column(key, None)

    def per_step(self, *keys: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
        """Register a function of a whole step's buffers.

        It returns one tensor a key, in order (a single tensor for a single key); None in place of
        what does not apply.
        """

        def register(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
            for key in keys:
                self._claim(key)
            self._per_step[keys] = function
            return function

        return register

    def _claim(self, key: str) -> None:
        if by_key(key).group != self.name:
            raise ValueError(f"{key} is declared in group {by_key(key).group}, not {self.name}")
        if key in self._measured:
            raise ValueError(f"{key} has two measuring functions")
        self._measured.add(key)

    def _add_column(self, key: str, function: Callable[[Any], Tensor | None] | None) -> None:
        metric = by_key(key)
        columns = self._mean_columns if metric.micro == "mean" else self._extreme_columns
        if metric.micro not in ("mean", "max", "min"):
            raise ValueError(f"{key} is reduced by {metric.micro}: measure it per step")
        # The smallest value is kept with its sign turned, so that every extreme is a maximum.
        column = f"{metric.name}_negated" if metric.micro == "min" else metric.name
        self._key_of_column[column] = key
        if metric.micro == "min":
            self._lowest |= {column}
        columns[column] = function

    @property
    def measured(self) -> frozenset[str]:
        """Keys of all metrics that a function of this group measures."""
        return frozenset(self._measured)

    @property
    def mean_columns(self) -> tuple[str, ...]:
        """Columns of the buffer of sums over tokens."""
        return tuple(self._mean_columns)

    @property
    def extreme_columns(self) -> tuple[str, ...]:
        """Columns of the buffer of maxima over tokens."""
        return tuple(self._extreme_columns)

    # -- measuring ---------------------------------------------------------------------------

    def reduce_tokens(
        self, seen: Any, tokens: int, kernel: StatsRows | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return sums (P, W) and maxima (P, W') over the tokens of one micro-batch.

        kernel: rows (P, B, W'') of partial results that a model's kernels measured; columns that it
        has are taken from it.
        """
        if kernel is not None and self.covered_by(kernel):
            sums = kernel.columns(self.mean_columns).sum(1)
            return sums, kernel.columns(self.extreme_columns).amax(1)

        taken = kernel.names if kernel is not None else ()
        means: list[Tensor | None] = [
            kernel.column(name).sum(1)
            if kernel is not None and name in taken
            else _sum_over_tokens(None if f is None else f(seen), tokens)
            for name, f in self._mean_columns.items()
        ]
        maxima: list[Tensor | None] = [
            kernel.column(name).amax(1)
            if kernel is not None and name in taken
            else self._extreme(name, None if f is None else f(seen))
            for name, f in self._extreme_columns.items()
        ]
        columns = _columns(means)
        return columns, _columns(maxima) if maxima else columns[:, :0]

    def covered_by(self, kernel: StatsRows | None) -> bool:
        """Return whether a kernel measured every column, so that no function has to run."""
        return kernel is not None and kernel.has((*self._mean_columns, *self._extreme_columns))

    def _extreme(self, column: str, values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        flat = values.flatten(1)
        return -flat.amin(1) if column in self._lowest else flat.amax(1)

    def token_values(self, means: Tensor, maxima: Tensor | None = None) -> Values:
        """Return the values of the `per_token` metrics.

        means: (P, W) sums over all micro-batches divided by the tokens; maxima: (P, W').
        """
        found = {
            self._key_of_column[column]: value
            for column, value in zip(self._mean_columns, means.unbind(-1), strict=True)
        }
        if maxima is not None:
            for column, value in zip(self._extreme_columns, maxima.unbind(-1), strict=True):
                key = self._key_of_column[column]
                found[key] = -value if column in self._lowest else value
        return found

    def step_values(self, seen: Any) -> Values:
        """Return what the `per_step` functions measure of a step."""
        values: Values = {}
        for keys, function in self._per_step.items():
            found = function(seen)
            if found is not None:
                pairs = zip(keys, [found] if len(keys) == 1 else found, strict=True)
                values |= {key: value for key, value in pairs if value is not None}
        return values


def _sum_over_tokens(values: Tensor | None, tokens: int) -> Tensor | None:
    if values is None:
        return None
    if values.shape[1] != tokens:
        return values.mean(1) * tokens
    return values.sum(1)


def _columns(found: list[Tensor | None]) -> Tensor:
    """Stack one value a place as columns; NaN for a metric that does not apply."""
    nothing = torch.full_like(next(v for v in found if v is not None), torch.nan)
    return torch.stack([nothing if v is None else v.float() for v in found], -1)
