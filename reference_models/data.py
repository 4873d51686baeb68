"""Batches: batch `step` is a pure function of (corpus, seed, step), so any run can resume."""

import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from geodiag.reference_models.text import Corpus


class Batch(NamedTuple):
    """One optimizer step's sequences."""

    step: int
    token_ids_BS: Tensor
    targets_BS: Tensor
    domain_B: tuple[str, ...]

    def to(self, device: torch.device) -> "Batch":
        tokens, targets = (
            t.to(device, non_blocking=True) for t in (self.token_ids_BS, self.targets_BS)
        )
        return self._replace(token_ids_BS=tokens, targets_BS=targets)

    def split(self, parts: int) -> list["Batch"]:
        """Return equal micro-batches. Raises ValueError if the sequences do not divide."""
        size, rest = divmod(len(self.domain_B), parts)
        if rest or not size:
            raise ValueError(
                f"{len(self.domain_B)} sequences do not make {parts} equal micro-batches"
            )
        return [
            Batch(
                self.step,
                self.token_ids_BS[i : i + size],
                self.targets_BS[i : i + size],
                self.domain_B[i : i + size],
            )
            for i in range(0, len(self.domain_B), size)
        ]


class Loader:
    """Random windows of the corpus, with domains in proportion to their size.

    `Loader.batch(step)` is deterministic. Iteration starts at `step` and never ends; a thread
    prepares up to four batches ahead.
    """

    def __init__(
        self, corpus: Corpus, sequences: int, sequence: int, seed: int = 0, step: int = 0
    ) -> None:
        self.corpus = corpus
        self.sequences = sequences
        self.sequence = sequence
        self.seed = seed
        self.step = step
        if sequences < 1 or seed < 0:
            raise ValueError(
                f"a loader takes sequences of at least 1 and a seed of at least 0, "
                f"not {sequences}, {seed}"
            )
        sizes = {d: len(t) - sequence for d, t in corpus.domains.items() if len(t) > sequence}
        if not sizes:
            raise ValueError(
                f"the text has {corpus.tokens} tokens, in no domain one sequence of "
                f"{sequence + 1}; add text"
            )
        self._names = list(sizes)
        self._sizes = np.array(list(sizes.values()))

    def batch(self, step: int) -> Batch:
        rng = np.random.default_rng((self.seed, step))
        # Systematic sampling: every batch has nearly the same mix of domains, so the loss does not
        # jump with it.
        ladder = (np.arange(self.sequences) + rng.random()) / self.sequences
        picks = np.searchsorted(np.cumsum(self._sizes) / self._sizes.sum(), ladder)
        starts = rng.integers(0, self._sizes[picks])
        names = tuple(self._names[p] for p in picks)
        windows = [
            self.corpus.domains[n][s : s + self.sequence + 1]
            for n, s in zip(names, starts, strict=True)
        ]
        ids = torch.from_numpy(np.stack(windows).astype(np.int64))
        return Batch(step, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), names)

    def __iter__(self) -> Iterator[Batch]:
        made: queue.Queue[Batch | Exception] = queue.Queue(maxsize=4)
        stop = threading.Event()

        def make(step: int) -> None:
            while not stop.is_set():
                try:
                    item: Batch | Exception = self.batch(step)
                except Exception as e:  # raised again in the thread that reads the batch
                    item = e
                while not stop.is_set():
                    try:
                        made.put(item, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                step += 1

        maker = threading.Thread(target=make, args=(self.step,), name="geodiag-data", daemon=True)
        maker.start()
        try:
            while True:
                item = made.get()
                if isinstance(item, Exception):
                    raise item
                self.step = item.step + 1
                yield item
        finally:
            stop.set()
            # Otherwise the thread could still be in numpy when the process ends.
            maker.join(timeout=1)

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed = state["seed"]
        self.step = state["step"]
