"""Training text: the standard library's source, a folder, a text file, or a flat token file."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_TEXT = {
    ".txt",
    ".md",
    ".rst",
    ".html",
    ".tex",
    ".csv",
    ".json",
    ".jsonl",
    ".xml",
    ".toml",
    ".cfg",
    ".ini",
    ".yaml",
}
_CODE = {
    ".py",
    ".pyi",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".cu",
    ".rs",
    ".go",
    ".js",
    ".ts",
    ".java",
    ".sh",
    ".sql",
    ".jl",
}
_WIDE_ID = 1 << 22
"""Larger than every vocabulary."""


@dataclass(frozen=True)
class Corpus:
    """Token ids by domain. Byte corpora have 256 ids."""

    domains: dict[str, np.ndarray]
    vocab: int

    @property
    def tokens(self) -> int:
        return sum(len(t) for t in self.domains.values())


def open_corpus(data: str) -> Corpus:
    """Open `stdlib`, a folder, a text file, or a `.bin` of uint16 or uint32 token ids.

    Raises FileNotFoundError or ValueError; the message names the fix.
    """
    if data == "stdlib":
        return stdlib()
    path = Path(data)
    if not path.exists():
        raise FileNotFoundError(
            f"{data} does not exist; pass --data stdlib, a folder, a text file or a .bin of tokens"
        )
    if path.is_file() and path.suffix == ".bin":
        return flat_tokens(path)
    files = [path] if path.is_file() else sorted(_texts_in(path))
    corpus = _bytes_by_domain((_kind(p), p) for p in files)
    if not corpus.tokens:
        what = "is empty" if path.is_file() else "holds no text or code files"
        raise ValueError(
            f"{data} {what}; pass a folder with some ({', '.join(sorted(_TEXT)[:4])}, .py, …)"
        )
    return corpus


def stdlib() -> Corpus:
    """Return the bytes of the standard library, in the domains code, tests, codecs and prose."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "__pycache__"}
    files = sorted(p for p in _texts_in(root) if not skip & set(p.relative_to(root).parts))

    def kind(p: Path) -> str:
        folder = set(p.relative_to(root).parts[:-1])
        if "encodings" in folder or p.name.startswith(("_pydecimal", "mbcs")) or "cjk" in p.name:
            return "codecs"
        if folder & {"test", "tests", "idle_test"}:
            return "tests"
        return "prose" if p.suffix in _TEXT or "pydoc_data" in folder else "code"

    return _bytes_by_domain((kind(p), p) for p in files)


def flat_tokens(path: Path) -> Corpus:
    """Map a flat little-endian token file of uint16 or uint32; the ids show which of the two."""
    size = path.stat().st_size
    if size < 4 or size % 2:
        raise ValueError(
            f"{path} has {size} bytes, no flat file of tokens; write the ids as uint16 or uint32 "
            f"and no more"
        )
    tokens = np.memmap(path, "<u4" if size % 4 == 0 and _is_wide(path) else "<u2", mode="r")
    largest = max(int(tokens[i : i + (1 << 24)].max()) for i in range(0, len(tokens), 1 << 24))
    return Corpus({path.stem: tokens}, vocab=largest + 1)


def _is_wide(path: Path) -> bool:
    """Whether the ids are 32-bit: then every second 16-bit word is a small high half."""
    low, high = np.fromfile(path, "<u2", count=1 << 20).reshape(-1, 2).max(0).tolist()
    return high < _WIDE_ID >> 16 and (high == 0 or low > 16 * high)


def _texts_in(folder: Path) -> Iterator[Path]:
    """Yield text and code files, without hidden folders such as `.venv`."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if _is_text(path) and not hidden and path.is_file():
            yield path


def _is_text(path: Path) -> bool:
    return path.suffix.lower() in _TEXT | _CODE


def _kind(path: Path) -> str:
    return "code" if path.suffix.lower() in _CODE else "prose"


def _bytes_by_domain(files: Iterator[tuple[str, Path]]) -> Corpus:
    pieces: dict[str, list[np.ndarray]] = {}
    for domain, path in files:
        raw = np.frombuffer(path.read_bytes(), np.uint8)
        if len(raw):
            pieces.setdefault(domain, []).append(raw)
    return Corpus({d: np.concatenate(p) for d, p in sorted(pieces.items())}, vocab=256)
