"""The journal of a table: an Arrow IPC stream, so that kill -9 loses no complete row.

Rows are handed to the operating system with the step that made them. A closed part names the
journals that it contains, so a reader that finds both the part and a journal counts the rows once.
"""

import contextlib
import io
import uuid
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

_ID = b"geodiag.store.journal"
_BROKEN = (pa.ArrowException, OSError, MemoryError)
"""Errors of Arrow for bytes that end early or are not valid, such as an absurd length."""


class Journal:
    """Appends record batches to one stream file, which is created by the first batch."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        self._file: BinaryIO | None = None
        self._begin()

    def append(self, batch: pa.RecordBatch) -> None:
        """Append one batch and hand it to the operating system before returning.

        OSError where the disk refuses it. The batch is kept in memory, and the next call writes the
        whole stream again, because a stream cannot be continued after half a batch.
        """
        self.batches.append(batch)
        self.bytes += batch.nbytes
        if self._file is None:
            self._rewrite()
            return
        try:
            self._stream.write_batch(batch)
            self._file.flush()
        except OSError:
            self._drop_file()
            raise

    def restart(self) -> None:
        """Remove all batches, on disk too, after the caller has closed a part that has them."""
        self._drop_file()
        self._begin()
        self.path.unlink(missing_ok=True)

    def _begin(self) -> None:
        self.id = uuid.uuid4().hex
        self.batches: list[pa.RecordBatch] = []
        self.bytes = 0

    def _rewrite(self) -> None:
        """Write all batches to a new file and give it the journal's name."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tmp = self.path.with_suffix(".tmp")
        file = tmp.open("wb", buffering=1 << 16)
        schema = self.schema.with_metadata({_ID: self.id.encode()})
        try:
            self._stream = pa.ipc.new_stream(file, schema)
            for batch in self.batches:
                self._stream.write_batch(batch)
            file.flush()
            tmp.replace(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                file.close()
            tmp.unlink(missing_ok=True)
            raise
        self._file = file

    def _drop_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # the error of the same full disk is raised already
                self._file.close()
            self._file = None


def read_journal(content: bytes) -> tuple[str, list[pa.RecordBatch]]:
    """Return the id of a journal and its complete batches; the id is "" if it is no Arrow stream.

    The last batch is left out where it is incomplete: its step was being written when the process
    died.
    """
    batches: list[pa.RecordBatch] = []
    try:
        stream = pa.ipc.open_stream(io.BytesIO(content))
        journal_id = (stream.schema.metadata or {}).get(_ID, b"").decode()
    except (*_BROKEN, UnicodeDecodeError):
        return "", []
    with contextlib.suppress(*_BROKEN):
        for batch in stream:
            batch.validate()
            batches.append(batch)
    return journal_id, batches
