"""Benchmark of `geodiag export`: time and memory for a long run of a deep model.

    geodiag bench export_speed [--steps 100000] [--layers 32] [--experts 8] [--run DIR]

The run is that of cascade_speed. The command itself is measured, each format in a process of its
own.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geodiag.benchmarks.cascade_speed import add_size, long_run
from geodiag.benchmarks.report import Parser, save, say, setting, where

FORMATS = ("csv", "tensorboard")


def measure(run: Path, to: str) -> dict[str, Any]:
    """Export with all defaults to a temporary folder; return seconds, memory and sizes."""
    with tempfile.TemporaryDirectory(dir=run.parent) as home:
        command = [
            sys.executable,
            "-m",
            "geodiag.cli",
            "export",
            str(run),
            "--to",
            to,
            "--out",
            f"{home}/out",
        ]
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(
            process.pid, 0
        )  # what this one took, not the largest of all so far
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        exported = json.loads((Path(home) / "out/export.json").read_text())
    return {
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "bytes": used.ru_maxrss * 1024,
        "rows": sum(exported["rows"].values()),
        "values": exported["values"],
        "written": sum(f["bytes"] for f in exported["files"]),
    }


def page(result: dict[str, Any]) -> str:
    """Return the result as a Markdown page."""
    asked = result["settings"]
    lines = [
        "# How long an export takes",
        "",
        f"{asked['steps']:,} steps of {asked['layers']} layers and {asked['experts']} experts, "
        f"{result['run_bytes'] / 1e9:.1f} GB; `geodiag export RUN --to …` with every default, "
        f"best of {asked['times']}.",
        "",
        "| to | rows read | written | on the clock | processor | memory, at most |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for to, m in result["formats"].items():
        lines.append(
            f"| {to} | {m['rows']:,} | {m['written'] / 1e9:.2f} GB | {m['seconds']:.0f} s "
            f"| {m['cpu_seconds']:.0f} s | {m['bytes'] / 1e6:.0f} MB |"
        )
    return "\n".join([*lines, "", where(result), "", f"    {result['command']}"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("export_speed", __doc__)
    add_size(parser, steps=100_000, experts=8)
    parser.set_defaults(times=1)  # minutes each
    options = parser.parse_args(argv)
    with long_run(options) as (home, settings):
        tries = {to: [measure(home, to) for _ in range(options.times)] for to in FORMATS}
        formats = {to: min(tried, key=lambda m: m["seconds"]) for to, tried in tries.items()}
        result = setting("export_speed", argv) | settings | {"formats": formats}
    save("export_speed", result, page(result), options.out)
    say(result, page(result), options.json)


if __name__ == "__main__":
    main()
