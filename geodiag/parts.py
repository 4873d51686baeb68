"""Parquet parts: closed, immutable pieces of a table, each naming the journals it was made from."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from geodiag.files import Folder

_JOURNALS = b"geodiag.journals"
MERGE = 10
"""So many neighbouring parts of one size class become one."""


@dataclass(frozen=True)
class Part:
    """A part that could be opened: its path, schema and the journals inside it."""

    path: str
    journals: frozenset[str]
    first: int
    last: int


def write_part(folder: Path, table: pa.Table, journals: list[str]) -> Path:
    """Writes `folder/part-<first>-<last>.parquet` whole, then gives it its name."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = table["step"].to_numpy()
    stem = f"part-{steps.min():08d}-{steps.max():08d}"
    path, twin = folder / f"{stem}.parquet", 1
    while path.exists():  # another attempt closed the same steps
        path, twin = folder / f"{stem}.{twin}.parquet", twin + 1
    tmp = folder / f".{path.name}.tmp"
    table = table.replace_schema_metadata({_JOURNALS: json.dumps(journals).encode()})
    pq.write_table(table, tmp, compression="zstd")
    os.replace(tmp, path)
    return path


def list_parts(store: Folder, sub: str, problems: dict[str, str]) -> list[Part]:
    """The parts of one table and rank that hold rows no larger part holds; unreadable ones go to `problems`."""
    parts = []
    for name in store.names(sub):
        if not name.endswith(".parquet") or name.startswith("."):
            continue
        path = store.path(f"{sub}/{name}")
        try:
            with store.fs.open(path, "rb") as f:
                meta = pq.read_metadata(f).metadata or {}
            journals = frozenset(json.loads(meta.get(_JOURNALS, b"[]")))
            first, last = (int(x) for x in name.split(".")[0].split("-")[1:3])
        except FileNotFoundError:
            continue  # merged away while we looked; the merged part is listed or will be
        except (pa.ArrowInvalid, OSError, ValueError) as e:
            problems[f"{sub}/{name}"] = f"unreadable ({str(e).splitlines()[0][:80]})"
            continue
        parts.append(Part(path, journals, first, last))
    return [p for p in parts if not any(p.journals < q.journals for q in parts)]


def merge_parts(folder: Path) -> None:
    """Joins the newest `MERGE` parts when they are of one size class; old files go last."""
    store = Folder.of(folder)
    parts = sorted(list_parts(store, ".", {}), key=lambda p: os.stat(p.path).st_mtime_ns)[-MERGE:]
    if len(parts) < MERGE or len({len(str(len(p.journals))) for p in parts}) > 1:
        return
    table = pa.concat_tables([pq.read_table(p.path) for p in parts], promote_options="default")
    write_part(folder, table, sorted(frozenset().union(*(p.journals for p in parts))))
    for part in parts:
        os.unlink(part.path)
