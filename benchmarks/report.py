"""Output of all benchmarks: machine, versions and command with the numbers, as JSON and a page."""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from geodiag.errors import GeodiagError

_BESIDE = Path(__file__).resolve().parent / "results"
_LIBRARIES = ("geodiag", "torch", "triton")


class Parser(argparse.ArgumentParser):
    """Options of a benchmark, with `--out` and `--json`. A mistake raises GeodiagError."""

    def __init__(self, bench: str, description: str | None) -> None:
        first = (description or "").split("\n\n")[0]
        super().__init__(prog=f"geodiag bench {bench}", description=first)
        self.add_argument(
            "--out", type=Path, default=results_folder(), help="folder of the results [%(default)s]"
        )
        self.add_argument(
            "--json", action="store_true", help="print the result as JSON, not as a page"
        )

    def error(self, message: str) -> NoReturn:
        raise GeodiagError(f"{message}; see {self.prog} --help")


def results_folder() -> Path:
    """Return benchmarks/results of the checkout; for an installed wheel, of the current folder."""
    return _BESIDE if _BESIDE.is_dir() else Path("benchmarks") / "results"


def setting(bench: str, argv: Sequence[str] | None, device: str = "cpu") -> dict[str, Any]:
    """Return command, machine and versions: the head of every result."""
    words = sys.argv[1:] if argv is None else argv
    command = " ".join(["geodiag", "bench", bench, *words])
    return {"command": command, "machine": machine(device), "versions": versions()}


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return processor, cores, system, and the accelerator if one was used."""
    found: dict[str, Any] = {
        "cpu": _processor(),
        "cores": _cores(),
        "system": platform.platform(terse=True),
    }
    if device.startswith("cuda"):
        import torch

        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def where(result: dict[str, Any]) -> str:
    """Return machine and versions on one line of a page."""
    m = result["machine"]
    v = result["versions"]
    place = f"{m.get('gpu', m['cpu'])}, {m['cores']} cores, {m['system']}"
    return f"{place}; " + ", ".join(f"{name} {number}" for name, number in v.items()) + "."


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that affect the numbers."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def present(device: str) -> str:
    """Return the device's name. GeodiagError if torch does not find the device."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise GeodiagError(
            "this is measured on a GPU, and torch sees none here; pass --device cpu for a dry run"
        )
    return device


def save(bench: str, result: dict[str, Any], page: str, out: Path) -> None:
    """Write BENCH.json and BENCH.md. GeodiagError if the folder cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{bench}.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / f"{bench}.md").write_text(page.rstrip() + "\n")
    except OSError as e:
        raise GeodiagError(f"cannot write {out}: {e.strerror}; pass another --out") from None


def say(result: dict[str, Any], page: str, as_json: bool) -> None:
    """Print the result."""
    print(json.dumps(result, indent=1) if as_json else page.rstrip())
