"""Optional packages: one clear line that names the extra to install.

The core of geodiag needs numpy, pandas, pyarrow and fsspec only. What needs more imports it when it
is used, inside `requires_extra`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from geodiag.errors import GeodiagError

EXTRAS = {
    "torch": ("torch", "triton"),
    "app": (
        "dash",
        "dash_ag_grid",
        "dash_mantine_components",
        "flask",
        "plotly",
        "tsdownsample",
        "werkzeug",
    ),
    "cli": ("typer", "rich"),
}
"""Extra of pyproject.toml → the modules that it installs."""


class MissingPackageError(GeodiagError, ImportError):
    """A package that an extra of geodiag installs is missing; the message names the extra."""


@contextmanager
def requires_extra(what: str) -> Iterator[None]:
    """Raise MissingPackageError for `what` where an optional package cannot be found.

    A missing module of any other package stays the error that it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        extra = next((e for e, modules in EXTRAS.items() if error.name in modules), None)
        if extra is None:
            raise
        raise MissingPackageError(
            f"{what} needs {error.name}, which is not installed: pip install 'geodiag[{extra}]'"
        ) from None
