"""For unedited scripts: every Python process of `geodiag run` loads this file as `sitecustomize`.

It is copied to a folder of its own and imported by no module of geodiag: Python may not find
geodiag at all. A process that does not import torch pays next to nothing; in others geodiag is
loaded right after torch.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

# Copies of what is in geodiag.hooks.autorecord.run_config; a test compares them.
VARIABLE = "GEODIAG_RUN"


def write_note(folder: str, weight: int, text: str) -> None:
    """Write this process's note. Of all processes, `geodiag run` prints the note of most weight."""
    try:
        with open(os.path.join(folder, f"note-{os.getpid()}"), "w", encoding="utf-8") as file:
            file.write(f"{weight} {text}")
    except OSError:  # `geodiag run` itself has ended, and its folder of notes is gone
        return


class AfterTorch:
    """The first finder of modules: finds none, and calls `begin` when torch has been imported."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return the other finders' spec of torch, whose loader then calls `begin`.

        A program may look for torch without importing it; nothing happens then.
        """
        if name != "torch":
            return None
        others = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        spec = next((s for f in others if (s := f.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            del loader.exec_module  # the loader is again as its finder made it
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._begin()

        loader.exec_module = exec_module


def begin() -> None:
    """Start geodiag, now that torch is imported. Whatever fails, the program goes on."""
    import json

    try:
        notes = json.loads(os.environ[VARIABLE])["notes"]
        write_note(notes, 1, "no optimizer of torch took a step")
        from geodiag.hooks.autorecord.session import start

        start()
    except ModuleNotFoundError as error:
        fix = f"install geodiag there: {sys.executable} -m pip install geodiag"
        write_note(notes, 2, f"{sys.executable} has no {error.name}; {fix}")
    except Exception as error:  # this is inside the program's `import torch`, which must not fail
        what = f"geodiag cannot record this process: {type(error).__name__}: {error}"
        with contextlib.suppress(Exception):  # stderr may be closed
            print(what, file=sys.stderr, flush=True)


def load_own_sitecustomize() -> None:
    """Load the environment's own sitecustomize, which this file hides, under its name."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if p != here]
    ours = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        sys.modules.setdefault("sitecustomize", ours)


if __name__ == "sitecustomize":
    if VARIABLE in os.environ and "torch" not in sys.modules:
        sys.meta_path.insert(0, AfterTorch(begin))
    load_own_sitecustomize()
