"""The journal: rows reach the operating system with the step that made them, so kill -9 loses none.

One Arrow IPC stream a table. A closed part names the journals it swallowed, so a reader that sees
both the part and the journal counts the rows once.
"""

import contextlib
import io
import uuid
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

_ID = b"geodiag.store.journal"
_TORN = (pa.ArrowException, OSError, MemoryError)
"""What Arrow raises over bytes that end early or make no sense; a mad length asks for mad memory.
"""


class Journal:
    """Appends record batches to one stream file, which appears with the first of them."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        self._file: BinaryIO | None = None
        self._begin()

    def append(self, batch: pa.RecordBatch) -> None:
        """One batch, handed to the operating system before this returns.

        OSError where the disk refuses it. The batch is kept, and the next call writes the stream
        anew: what was torn off in the middle of a batch cannot be continued.
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
            self._give_up_file()
            raise

    def restart(self) -> None:
        """Forgets everything, on disk too: the caller has closed a part that holds it."""
        self._give_up_file()
        self._begin()
        self.path.unlink(missing_ok=True)

    def _begin(self) -> None:
        self.id = uuid.uuid4().hex
        self.batches: list[pa.RecordBatch] = []
        self.bytes = 0

    def _rewrite(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tmp = self.path.with_suffix(".tmp")
        file = tmp.open("wb", buffering=1 << 16)
        try:
            self._stream = pa.ipc.new_stream(
                file, self.schema.with_metadata({_ID: self.id.encode()})
            )
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

    def _give_up_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # the same full disk, told once already
                self._file.close()
            self._file = None


def read_journal(raw: bytes) -> tuple[str, list[pa.RecordBatch]]:
    """The journal's id and its complete batches; a torn last batch is left out. The id of nonsense
    is "".
    """
    batches: list[pa.RecordBatch] = []
    try:
        stream = pa.ipc.open_stream(io.BytesIO(raw))
        name = (stream.schema.metadata or {}).get(_ID, b"").decode()
    except (*_TORN, UnicodeDecodeError):
        return "", []
    try:
        for batch in stream:
            batch.validate()
            batches.append(batch)
    except _TORN:
        pass  # the step in flight when the process died: its batch has no end
    return name, batches
