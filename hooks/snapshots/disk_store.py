"""Snapshots on disk: each a torch.distributed.checkpoint of its own, written in a thread.

A snapshot is written to `.step-00000250/` and renamed to `step-00000250/` when it is complete, so
that a reader finds either a whole snapshot or none. An error of the disk is kept by the thread and
raised at the next snapshot.
"""

import re
import shutil
import warnings
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from geodiag.hooks.record.serial_worker import Worker
from geodiag.hooks.snapshots.host_buffer import HostBuffer
from geodiag.store.files import first_line

_STRUCTURE = "geodiag"
"""Name of a snapshot's `Structure` in the checkpoint, beside its tensors."""
_NO_DIST = "torch.distributed is disabled, unavailable or uninitialized"
"""A warning of torch that does not apply: each rank writes and reads its own snapshots."""
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Structure:
    """Everything of a snapshot that is not a tensor."""

    tree: Any
    """The state with a slot for each tensor."""
    extra: dict[str, Any]
    """The caller's own state, unchanged."""
    names: list[str]
    """Names of the tensors, in the order of the slots."""


def snapshots_in(run: Path, rank: int = 0) -> list[int]:
    """Return the steps of a run's complete snapshots on disk."""
    return _steps_in(folder_of(run, rank))


def folder_of(run: Path, rank: int) -> Path:
    return run / "snapshots" / f"rank-{rank}"


def _steps_in(folder: Path) -> list[int]:
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(m[1]) for n in names if (m := _NAME.fullmatch(n)))


def _disk_error(error: BaseException) -> BaseException:
    """Return the cause inside torch's CheckpointException as an OSError.

    CheckpointException is a BaseException, which would end the training.
    """
    if not isinstance(error, CheckpointException):
        return error
    causes = [cause for cause, _trace in error.failures.values()]
    for cause in causes:
        if isinstance(cause, OSError):
            return cause
    return OSError(first_line(causes[0] if causes else error))


class DiskSnapshots:
    """One rank's folder of snapshots: `step-00000250/` and so on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        warnings.filterwarnings("ignore", _NO_DIST)
        folder.mkdir(parents=True, exist_ok=True)
        for incomplete in folder.glob(".step-*"):
            shutil.rmtree(incomplete)  # an earlier process was killed while it wrote
        self._complete = set(_steps_in(folder))
        self._writer = Worker("geodiag-snapshots")
        self._write: Future[None] | None = None
        self._write_step: int | None = None

    def steps(self) -> list[int]:
        """Return the complete snapshots and the one that is being written.

        Reads no directory, because it is called at every step.
        """
        being_written = {self._write_step} if self._busy and self._write_step is not None else set()
        return sorted(self._complete | being_written)

    def ready(self) -> bool:
        """Return whether the last write is over. Raises the OSError of a failed write, once."""
        if self._busy:
            return False
        self._raise_disk_error()
        return True

    @property
    def _busy(self) -> bool:
        return self._write is not None and not self._write.done()

    def write(
        self,
        step: int,
        tree: Any,
        extra: dict[str, Any],
        tensors: dict[str, Tensor],
        buffer: HostBuffer,
        keep: int,
    ) -> None:
        """Write a snapshot in the thread, then keep only the newest `keep` snapshots.

        The caller must not fill `buffer`, which holds the tensors, until `ready`.
        """

        def work() -> None:
            buffer.wait()
            incomplete = self.folder / f".step-{step:08d}"
            shutil.rmtree(incomplete, ignore_errors=True)
            try:
                state = {**tensors, _STRUCTURE: Structure(tree, extra, list(tensors))}
                writer = FileSystemWriter(incomplete, thread_count=4)
                dcp.save(state, storage_writer=writer, no_dist=True)
                _check_written(incomplete, state)
                incomplete.rename(self._path(step))
                self._complete.add(step)
                for old in sorted(self._complete)[:-keep]:
                    self._remove(old)
            except BaseException as e:
                # An incomplete snapshot would occupy the space that is missing.
                shutil.rmtree(incomplete, ignore_errors=True)
                raise _disk_error(e) from None

        self._write_step = step
        self._write = self._writer.submit(work)

    def read(self, step: int) -> tuple[Structure, list[Tensor]]:
        """Return a snapshot with its tensors in host memory. OSError if it is unreadable."""
        self.wait()
        path = self._path(step)
        reader = FileSystemReader(path)
        try:
            entries = reader.read_metadata().state_dict_metadata
            state: dict[str, Any] = {
                name: torch.empty(m.size, dtype=m.properties.dtype)
                if isinstance(m, TensorStorageMetadata)
                else None
                for name, m in entries.items()
            }
            dcp.load(state, storage_reader=reader, no_dist=True)
            structure = state.pop(_STRUCTURE)
        except (Exception, CheckpointException) as e:  # torch raises many types for a damaged file
            raise OSError(
                f"{path} is unreadable ({_disk_error(e)}); remove it to use an earlier one"
            ) from None
        return structure, [state[name] for name in structure.names]

    def keep_newest(self, count: int) -> None:
        """Remove all but the newest `count` snapshots."""
        steps = self.steps()
        for step in steps[: max(len(steps) - count, 0)]:
            self._remove(step)

    def drop_after(self, step: int) -> None:
        """Remove the snapshots after `step`, because training was rolled back to it."""
        self.wait()
        for later in [s for s in self.steps() if s > step]:
            self._remove(later)

    def _remove(self, step: int) -> None:
        self._complete.discard(step)
        shutil.rmtree(self._path(step), ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def wait(self) -> None:
        """Wait for the thread. An error of the disk is not raised here."""
        if self._write is not None:
            self._write.exception()

    def _raise_disk_error(self) -> None:
        finished = self._write
        self._write = None
        if finished is not None:
            finished.result()

    def close(self) -> None:
        """End the thread after the current write. OSError if that write failed."""
        self._writer.stop()
        self._raise_disk_error()


def _check_written(folder: Path, state: dict[str, Any]) -> None:
    """OSError if the checkpoint lacks entries of `state`.

    torch raises nothing for a failure in its additional writing threads, and torch 2.11 returns
    nothing about it.
    """
    written = FileSystemReader(folder).read_metadata().storage_data
    missing = state.keys() - {entry.fqn for entry in written or ()}
    if missing:
        raise OSError(
            f"{len(missing)} of the snapshot's {len(state)} pieces were not written; free some disk"
        )
