"""What `report` and `compare` share: the page becomes one file, whose name is said, and is opened
where asked.
"""

import re
from pathlib import Path

from geodiag.errors import GeodiagError

OUT = "File to write, or a folder for it."
OPEN = "Open the page in a browser."
JSON = "Print JSON; a page is then written only with --out or --open."
_LONGEST = 80
"""Letters of a name that is made from the runs' names."""


def write_page(text: str, out: Path | None, name: str, *, then_open: bool) -> Path:
    """Writes the page to `out`, else to `name`.html in this folder. GeodiagError where it cannot be
    written.
    """
    from geodiag.store.files import write_whole

    usual = re.sub(r"[^\w.=+-]+", "-", name)[:_LONGEST].strip("-.") + ".html"
    path = Path(usual) if out is None else out / usual if out.is_dir() else out
    try:
        write_whole(path, text)
    except OSError as e:
        raise GeodiagError(
            f"cannot write {path}: {e.strerror or e}; pass --out with a file you may write"
        ) from None
    if then_open:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
    return path


def size_of(path: Path) -> str:
    """`5.1 MB`."""
    return f"{path.stat().st_size / 1e6:.1f} MB"
