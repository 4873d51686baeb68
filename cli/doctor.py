"""`geodiag doctor`: check what this machine can do, and name the fix for what it cannot."""

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from geodiag.cli.output import print_json, screen

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FREE_GB = 5.0
"""Below this free disk space the check warns: a recorded run writes about as much in a day."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the output: what was checked, what was found, and the fix."""

    name: str
    state: Literal["ok", "warn", "missing"]
    found: str
    fix: str = ""


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check this machine: Python, torch, GPUs, Triton, browser, disk, versions.

    Exit code 1 if training is impossible because torch is missing.
    """
    checks = [
        _python(),
        *_torch(),
        _triton(),
        _chromium(),
        _disk(Path.cwd()),
        _cores(),
        _pins(_constraints()),
    ]
    if json:
        print_json([asdict(c) for c in checks])
    else:
        _print(checks)
    if any(c.state == "missing" and c.name == "torch" for c in checks):
        raise typer.Exit(1)


def find_chromium() -> str | None:
    """Return the path of Chromium or Chrome, None if there is neither."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def _python() -> Check:
    return Check(name="python", state="ok", found=f"{platform.python_version()} in {sys.prefix}")


def _torch() -> list[Check]:
    try:
        import torch
    except ImportError as e:
        return [Check(name="torch", state="missing", found=str(e), fix="pip install torch")]
    checks = [
        Check(
            name="torch",
            state="ok",
            found=f"{torch.__version__}, {torch.get_num_threads()} threads",
        )
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            checks.append(
                Check(
                    name=f"gpu {i}",
                    state="ok",
                    found=f"{card.name}, {card.total_memory / 2**30:.0f} GiB",
                )
            )
    else:
        built = (
            f"torch built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else "torch built for CPUs only"
        )
        fix = (
            ""
            if shutil.which("nvidia-smi") is None
            else "this machine has an NVIDIA driver: install the CUDA build of torch"
        )
        checks.append(
            Check(
                name="gpu", state="warn", found=f"none; {built}; training runs on the CPU", fix=fix
            )
        )
    grouped = hasattr(torch.nn.functional, "grouped_mm") or hasattr(torch, "_grouped_mm")
    fix = "" if grouped else "pip install 'torch>=2.11'"
    found = "available" if grouped else "not in this torch; experts run one after another"
    checks.append(
        Check(name="grouped matmul", state="ok" if grouped else "warn", found=found, fix=fix)
    )
    return checks


def _triton() -> Check:
    try:
        import triton
    except ImportError:
        return Check(
            name="triton",
            state="missing",
            found="not installed; reference kernels are used",
            fix="pip install triton",
        )
    return Check(name="triton", state="ok", found=triton.__version__)


def _chromium() -> Check:
    path = find_chromium()
    if path is None:
        fix = "apt-get install chromium; only the browser tests need it"
        return Check(name="chromium", state="warn", found="none", fix=fix)
    return Check(name="chromium", state="ok", found=path)


def _disk(where: Path) -> Check:
    free = shutil.disk_usage(where).free / 1e9
    if not os.access(where, os.W_OK):
        return Check(
            name="disk",
            state="warn",
            found=f"{where} cannot be written",
            fix="work in a folder that you may write",
        )
    fix = "" if free >= FREE_GB else "free some space, or record to another disk with --run"
    return Check(
        name="disk",
        state="ok" if free >= FREE_GB else "warn",
        found=f"{free:.0f} GB free in {where}",
        fix=fix,
    )


def _cores() -> Check:
    usable = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return Check(name="cores", state="ok", found=f"{usable} usable of {os.cpu_count()}")


def _constraints() -> Path:
    """Return the path of the checkout's constraints.txt; an installed wheel has none."""
    return Path(__file__).resolve().parent.parent / "constraints.txt"


def _pins(constraints: Path) -> Check:
    """Compare the installed versions with the versions that were tested."""
    from importlib.metadata import PackageNotFoundError, version

    if not constraints.is_file():
        return Check(
            name="versions",
            state="ok",
            found="not compared: this installation has no constraints.txt",
        )
    lines = [line.split(";")[0].strip() for line in constraints.read_text().splitlines()]
    pins = dict(line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))
    differ = []
    for name, pinned in pins.items():
        try:
            have = version(name).split("+")[0]  # 2.13.0+cpu is 2.13.0, built for another machine
        except PackageNotFoundError:
            continue  # only the tests need this package
        if have != pinned:
            differ.append(f"{name} {have} (tested: {pinned})")
    if differ:
        fix = f"pip install -c {constraints.name} -e ."
        return Check(name="versions", state="warn", found=", ".join(differ), fix=fix)
    return Check(name="versions", state="ok", found=f"as in {constraints.name}")


def _print(checks: list[Check]) -> None:
    from rich.table import Table
    from rich.text import Text

    style = {"ok": "green", "warn": "yellow", "missing": "red"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for c in checks:
        table.add_row(
            Text(c.state, style[c.state]), c.name, Text(c.found + (f"\n→ {c.fix}" if c.fix else ""))
        )
    screen().print(table)
