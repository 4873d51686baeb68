"""Files of a run: written whole or not at all, read from anywhere fsspec reaches."""

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
    """Write `text` to `path` so that a reader gets the old content or the new, never a part."""
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
    """Return the first sentence of an error's message, cut to `width` characters."""
    lines = str(error).splitlines()
    return lines[0].split(". ")[0].rstrip(".")[:width] if lines else type(error).__name__


@dataclass(frozen=True)
class Folder:
    """A folder on a local disk or behind any fsspec URL, for reading."""

    fs: Any
    """The fsspec file system."""
    root: str
    """Path of the folder in the file system."""
    url: str
    """Path or URL as the user wrote it."""

    @classmethod
    def of(cls, url: str | os.PathLike[str]) -> "Folder":
        """Return the folder at a path or URL. GeodiagError for a URL that fsspec cannot open."""
        try:
            fs, root = fsspec.core.url_to_fs(os.fspath(url))
        except (ValueError, ImportError) as e:
            raise GeodiagError(f"cannot open {url}: {first_line(e)}") from None
        return cls(fs, root.rstrip("/") or "/", os.fspath(url))

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a disk of this machine."""
        protocols = self.fs.protocol
        return "file" in (protocols if isinstance(protocols, tuple) else (protocols,))

    def path(self, name: str) -> str:
        """Return the path of a file or folder in the file system."""
        return f"{self.root}/{name}"

    def names(self, sub: str = "") -> list[str]:
        """Return the sorted names in the folder `sub`; an absent folder is empty."""
        path = self.path(sub) if sub else self.root
        try:
            # A remote file system caches listings, but a running training adds files.
            self.fs.invalidate_cache(path)
            entries = self.fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except PermissionError:
            raise GeodiagError(
                f"cannot list {path}: permission denied; check the folder's rights"
            ) from None
        return sorted(e.rstrip("/").rsplit("/", 1)[-1] for e in entries)

    def exists(self, name: str = "") -> bool:
        """Return whether there is such a file or folder."""
        return bool(self.fs.exists(self.path(name) if name else self.root))

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None where there is no such file."""
        try:
            content: bytes = self.fs.cat_file(self.path(name))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except PermissionError:
            raise GeodiagError(
                f"cannot read {self.path(name)}: permission denied; check the file's rights"
            ) from None
        return content

    def read_json(self, name: str) -> Any:
        """Return the JSON of a file, or None where the file is absent or not valid JSON."""
        content = self.read(name)
        try:
            return None if content is None else json.loads(content)
        except ValueError:
            return None
