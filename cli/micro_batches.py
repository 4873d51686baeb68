"""A loader's batches in micro-batches."""

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geodiag.reference_models.data import Batch, Loader


class MicroBatches:
    """Iterates over the loader's batches, each split into micro-batches by `split`.

    The state is the loader's: a position between steps, never inside one.
    """

    def __init__(self, loader: "Loader", split: Callable[["Batch"], list["Batch"]]) -> None:
        self._loader = loader
        self._split = split
        self._generator: Generator[Batch] | None = None

    def __iter__(self) -> Iterator["Batch"]:
        self._generator = self._generate()
        return self._generator

    def _generate(self) -> Generator["Batch"]:
        for batch in self._loader:
            yield from self._split(batch)

    def close(self) -> None:
        """End the newest iteration."""
        if self._generator is not None:
            self._generator.close()

    def state_dict(self) -> dict[str, int]:
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._loader.load_state_dict(state)
