"""Files of a run: whole or not at all when written, anywhere fsspec reaches when read."""

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from geodiag.errors import GeodiagError
from geodiag.jsonable import jsonable


def write_whole(path: Path, text: str) -> None:
    """Writes `text` to `path` so that a reader sees the old file or the new one, never a part."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        tmp.write_text(text, encoding="utf-8")
        os.replace(tmp, path)
    except OSError:
        tmp.unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON with `write_whole`."""
    write_whole(path, json.dumps(jsonable(data), indent=1, allow_nan=False) + "\n")


def first_line(error: BaseException, width: int = 80) -> str:
    """What went wrong, in one short line: the first sentence."""
    lines = str(error).splitlines()
    return lines[0].split(". ")[0].rstrip(".")[:width] if lines else type(error).__name__


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
            raise GeodiagError(f"cannot open {url}: {first_line(e)}") from None
        return cls(fs, root.rstrip("/") or "/", os.fspath(url))

    @property
    def is_local(self) -> bool:
        return "file" in (
            self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,)
        )

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def names(self, sub: str = "") -> list[str]:
        """Names of what lies in `sub`; an absent folder holds nothing."""
        path = self.path(sub) if sub else self.root
        try:
            self.fs.invalidate_cache(
                path
            )  # a remote file system remembers listings; a running run outgrows them
            entries = self.fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except PermissionError:
            raise GeodiagError(
                f"cannot list {path}: permission denied; check the folder's rights"
            ) from None
        return sorted(e.rstrip("/").rsplit("/", 1)[-1] for e in entries)

    def exists(self, name: str = "") -> bool:
        """Whether there is such a file or folder."""
        return self.fs.exists(self.path(name) if name else self.root)

    def read(self, name: str) -> bytes | None:
        """The file's bytes, or None where there is no such file."""
        try:
            return self.fs.cat_file(self.path(name))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except PermissionError:
            raise GeodiagError(
                f"cannot read {self.path(name)}: permission denied; check the file's rights"
            ) from None

    def read_json(self, name: str) -> Any:
        """The file's JSON, or None where it is absent or unreadable."""
        raw = self.read(name)
        try:
            return None if raw is None else json.loads(raw)
        except ValueError:
            return None
