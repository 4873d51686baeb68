"""Write the HTML file of `geodiag report` and `geodiag compare`."""

import re
from pathlib import Path

from geodiag.errors import GeodiagError

OUT = "File to write, or an existing folder for it."
OPEN = "Open the file in a browser."
JSON = "Print JSON; the file is then written only with --out or --open."

_MAX_NAME_LENGTH = 80
"""Characters of a file name that is made of the runs' names."""


def write_page(text: str, out: Path | None, name: str, *, then_open: bool) -> Path:
    """Write the page to `out`, or to `name`.html in the current folder; return the path.

    GeodiagError if the file cannot be written.
    """
    from geodiag.store.files import write_whole

    default_name = re.sub(r"[^\w.=+-]+", "-", name)[:_MAX_NAME_LENGTH].strip("-.") + ".html"
    if out is None:
        path = Path(default_name)
    else:
        path = out / default_name if out.is_dir() else out
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
    """Return the size of the file, e.g. `5.1 MB`."""
    return f"{path.stat().st_size / 1e6:.1f} MB"
