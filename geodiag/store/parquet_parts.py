"""Parquet parts: closed, immutable pieces of a table; each names the journals it was made from.

Small parts are merged into larger ones. A merged part names the journals of all its parts, so a
reader leaves out a part whose journals are all in another one.
"""

import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from geodiag.store.files import Folder, first_line

_JOURNALS = b"geodiag.journals"
UNREADABLE = (pa.ArrowException, OSError, ValueError, TypeError, MemoryError)
"""Errors of Arrow for a part that is no Parquet file, or was cut off or overwritten."""
MERGE = 10
"""Parts of one size class that are merged into one."""
GROUP_ROWS = 1 << 15
"""Rows of a row group: a reader of a few steps of a large part reads little more than these."""
MERGE_BYTES = 128 << 20
"""Largest merge, because a merge holds its parts in memory beside the training."""


@dataclass(frozen=True)
class Part:
    """A part whose footer could be read."""

    path: str
    journals: frozenset[str]
    """Ids of the journals whose rows it contains."""
    rows: int
    first: int
    """First step."""
    last: int
    """Last step."""

    def replaces(self, other: "Part") -> bool:
        """Return whether this part contains all rows of `other`.

        Of two parts with the same journals, exactly one replaces the other.
        """
        if not other.journals or self is other:
            return False  # a part without journals was not written by geodiag, and is kept
        if self.journals == other.journals:
            return (self.rows, self.path) > (other.rows, other.path)
        return self.journals > other.journals


def write_part(folder: Path, table: pa.Table, journals: list[str]) -> Path:
    """Write `part-<first>-<last>.parquet` to a temporary file, sync it to the disk, rename it."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = table["step"].to_numpy()
    stem = f"part-{steps.min():08d}-{steps.max():08d}"
    path = folder / f"{stem}.parquet"
    twin = 1
    while path.exists():  # another attempt closed the same steps
        path = folder / f"{stem}.{twin}.parquet"
        twin += 1
    tmp = folder / f".{path.name}.tmp"
    table = table.replace_schema_metadata({_JOURNALS: json.dumps(journals).encode()})
    try:
        with tmp.open("wb") as f:
            pq.write_table(table, f, compression="zstd", row_group_size=GROUP_ROWS)
            f.flush()
            os.fsync(f.fileno())  # the caller removes the journal next; a crash must not lose both
        os.replace(tmp, path)
    except OSError:
        tmp.unlink(missing_ok=True)  # half a part would use the space of a full disk
        raise
    return path


def list_parts(store: Folder, sub: str, problems: dict[str, str]) -> list[Part]:
    """Return the parts of one table and rank that no other part replaces.

    Unreadable parts are entered in `problems`. FileNotFoundError where a part was merged away
    after the listing; then list again.
    """
    return _live_and_stale(store, sub, problems)[0]


def _live_and_stale(
    store: Folder, sub: str, problems: dict[str, str]
) -> tuple[list[Part], list[Part]]:
    """Return the parts that no other part replaces, and those that another part replaces."""
    parts: list[Part] = []
    for name in store.names(sub):
        if not name.endswith(".parquet") or name.startswith("."):
            continue
        name = f"{sub}/{name}" if sub else name
        try:
            parts.append(_read_footer(store, name))
        except FileNotFoundError:
            raise
        except UNREADABLE as e:
            problems[name] = f"unreadable ({first_line(e)})"
    holders = defaultdict(list)
    for part in parts:
        for journal in part.journals:
            holders[journal].append(part)
    live: list[Part] = []
    stale: list[Part] = []
    for part in parts:
        rivals = holders[next(iter(part.journals))] if part.journals else []
        (stale if any(r.replaces(part) for r in rivals) else live).append(part)
    return live, stale


def _read_footer(store: Folder, name: str) -> Part:
    path = store.path(name)
    with store.fs.open(path, "rb") as f:
        footer = pq.read_metadata(f)
    journals = frozenset(json.loads((footer.metadata or {}).get(_JOURNALS, b"[]")))
    first, last = (int(x) for x in name.rsplit("/", 1)[-1].split(".")[0].split("-")[1:3])
    return Part(path, journals, footer.num_rows, first, last)


def merge_parts(folder: Path) -> None:
    """Merge the newest `MERGE` parts of each size class; a merged part enters the next class.

    Where one of them cannot be read nothing is merged, until later parts take its place.
    """
    store = Folder.of(folder)
    live, _ = _live_and_stale(store, "", {})
    classes = defaultdict(list)
    for part in sorted(live, key=lambda p: os.stat(p.path).st_mtime_ns):
        classes[len(str(len(part.journals)))].append(part)
    for size in sorted(classes):
        group = classes[size][-MERGE:]
        if len(group) < MERGE or sum(os.stat(p.path).st_size for p in group) > MERGE_BYTES:
            continue
        try:
            tables = [pq.read_table(p.path) for p in group]
            table = pa.concat_tables(tables, promote_options="default")
        except UNREADABLE:
            continue
        path = write_part(folder, table, sorted(frozenset().union(*(p.journals for p in group))))
        for part in group:
            os.unlink(part.path)
        merged = _read_footer(store, path.name)
        classes[len(str(len(merged.journals)))].append(merged)


def sweep(folder: Path) -> None:
    """Remove what a killed process left: half-written files, and parts that were merged already."""
    for tmp in folder.glob(".*.tmp"):
        tmp.unlink()
    for part in _live_and_stale(Folder.of(folder), "", {})[1]:
        os.unlink(part.path)
