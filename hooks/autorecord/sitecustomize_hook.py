"""For scripts that nobody edited: every Python process of `geodiag run` loads this file, as its
sitecustomize.

It stands alone, and costs a process next to nothing: anything of geodiag is loaded only where a
program imports torch of its own accord, right behind it.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

ORDERS = "GEODIAG_RUN"
"""The environment variable with what is to be recorded, as JSON; see
`geodiag.hooks.autorecord.run_config`.
"""


class AfterTorch:
    """Stands first among the finders of modules, finds none, and calls `begin` when torch has been
    imported.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """What the other finders say. Looking whether torch is there is not importing it, so it
        only waits.
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
    """Torch is there: looks out for a training. Whatever fails, the program goes on."""
    import json

    try:
        notes = json.loads(os.environ[ORDERS])["notes"]
        note(notes, 1, "no optimizer of torch took a step")
        from geodiag.hooks.autorecord.session import look_out

        look_out()
    except ModuleNotFoundError as e:
        note(
            notes,
            2,
            f"{sys.executable} has no {e.name}; install geodiag there: {sys.executable} -m pip install geodiag",
        )
    except (
        Exception
    ) as e:  # this runs inside of the program's own `import torch`, which must not fail for it
        print(
            f"geodiag cannot look into this process: {type(e).__name__}: {e}",
            file=sys.stderr,
            flush=True,
        )


def note(folder: str, weight: int, text: str) -> None:
    """Leaves word how far this process came: the heaviest note is what `geodiag run` says if
    nothing was recorded.
    """
    try:
        with open(os.path.join(folder, f"note-{os.getpid()}"), "w", encoding="utf-8") as file:
            file.write(f"{weight} {text}")
    except OSError:  # `geodiag run` itself is gone, and nobody will read it
        return


def give_way() -> None:
    """Loads the sitecustomize that this file came before, if there is one, in its place and under
    its name.
    """
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if p != here]
    ours = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
    except ModuleNotFoundError as e:
        if e.name != "sitecustomize":
            raise
    finally:
        sys.modules.setdefault("sitecustomize", ours)


if __name__ == "sitecustomize":
    if ORDERS in os.environ and "torch" not in sys.modules:
        sys.meta_path.insert(0, AfterTorch(begin))
    give_way()
