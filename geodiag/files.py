"""Files of a run: whole or not at all when written, anywhere fsspec reaches when read."""

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from geodiag.errors import GeodiagError


def write_whole(path: Path, text: str) -> None:
    """Writes `text` to `path` so that a reader sees the old file or the new one, never a part."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


def write_json(path: Path, data: Any) -> None:
    """`write_whole` of indented JSON; a NaN becomes null, so that every JSON reader takes it."""
    write_whole(path, json.dumps(_finite(data), indent=1) + "\n")


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _finite(v) for k, v in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(v) for v in data]
    if isinstance(data, float) and (data != data or data in (float("inf"), float("-inf"))):
        return None
    return data


@dataclass(frozen=True)
class Folder:
    """A folder on a local disk or behind any fsspec URL, for reading."""

    fs: Any
    root: str
    url: str

    @classmethod
    def of(cls, url: str | os.PathLike) -> "Folder":
        try:
            fs, root = fsspec.core.url_to_fs(os.fspath(url))
        except (ValueError, ImportError) as e:
            raise GeodiagError(f"cannot open {url}: {e}") from None
        return cls(fs, root.rstrip("/") or "/", os.fspath(url))

    @property
    def is_local(self) -> bool:
        return "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def names(self, sub: str = "") -> list[str]:
        """Names of what lies in `sub`; an absent folder holds nothing."""
        try:
            entries = self.fs.ls(self.path(sub) if sub else self.root, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(e.rstrip("/").rsplit("/", 1)[-1] for e in entries)

    def read(self, name: str) -> bytes | None:
        """The file's bytes, or None where there is no such file."""
        try:
            return self.fs.cat_file(self.path(name))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def read_json(self, name: str) -> Any:
        """The file's JSON, or None where it is absent or unreadable."""
        raw = self.read(name)
        try:
            return None if raw is None else json.loads(raw)
        except ValueError:
            return None
