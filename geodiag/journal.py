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

_ID = b"geodiag.journal"


class Journal:
    """Appends record batches to one stream file; `restart` begins an empty one in its place."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path, self.schema = path, schema
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO | None = None
        self.restart()

    def append(self, batch: pa.RecordBatch) -> None:
        """One batch, handed to the operating system before this returns.

        OSError where the disk refuses it. The batch is kept, and the next call writes the stream anew:
        what was torn off in the middle of a batch cannot be continued.
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
        """Forgets everything: the caller has closed a part that holds it."""
        self.id = uuid.uuid4().hex
        self.batches: list[pa.RecordBatch] = []
        self.bytes = 0
        self._rewrite()

    def close(self) -> None:
        """Ends the stream; the file stays."""
        if self._file is not None:
            self._stream.close()
            self._file.close()

    def _rewrite(self) -> None:
        self._give_up_file()
        tmp = self.path.with_suffix(".tmp")
        file = tmp.open("wb", buffering=1 << 16)
        try:
            self._stream = pa.ipc.new_stream(file, self.schema.with_metadata({_ID: self.id.encode()}))
            for batch in self.batches:
                self._stream.write_batch(batch)
            file.flush()
        except OSError:
            tmp.unlink(missing_ok=True)
            raise
        tmp.replace(self.path)
        self._file = file

    def _give_up_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # the same full disk, told once already
                self._file.close()
            self._file = None


def read_journal(raw: bytes) -> tuple[str, list[pa.RecordBatch]]:
    """The journal's id and its complete batches; a torn last batch is left out."""
    batches: list[pa.RecordBatch] = []
    try:
        stream = pa.ipc.open_stream(io.BytesIO(raw))
        name = (stream.schema.metadata or {}).get(_ID, b"").decode()
    except (pa.ArrowInvalid, OSError):
        return "", []
    try:
        for batch in stream:
            batches.append(batch)
    except (pa.ArrowInvalid, OSError):
        pass  # the step in flight when the process died: its batch has no end
    return name, batches
