"""The result of `geodiag bench ranks` as a Markdown page."""

from collections.abc import Mapping
from typing import Any

from geodiag.benchmarks.report import where

PARALLEL = ("ddp", "fsdp")
_COMPARED = ("with_geodiag", "without_again", "with_a_broken_probe")


def markdown(result: Mapping[str, Any]) -> str:
    worker = result.get("worker", {})
    timed = [p for p in PARALLEL if p in worker]
    lines = [
        f"# {result['ranks']} ranks",
        "",
        where(dict(result)),
        "",
        *(_timed(worker, timed) if timed else ["Nothing was timed.", ""]),
    ]
    findings = [
        (f"{parallel}, {what}", say(result[name]))
        for parallel in PARALLEL
        for what, say, name in (
            ("a fault that is answered", _steered, f"steered_{parallel}"),
            ("rank 1 killed", _killed, f"killed_{parallel}"),
            ("rank 1 without its newest snapshot", _resumed, f"resumed_{parallel}"),
        )
        if name in result
    ]
    findings += [
        (f"{p}, against one process", _same(result["same"], p))
        for p in PARALLEL
        if "same" in result
    ]
    if findings:
        lines += ["| | |", "|---|---|", *(f"| {what} | {words} |" for what, words in findings), ""]
    return "\n".join([*lines, f"    {result['command']}", ""])


def _timed(worker: Mapping[str, Any], timed: list[str]) -> list[str]:
    lines = [
        "Losses: the largest difference from a training without geodiag; a probe is broken on "
        "one rank only.",
        "",
        "| | with geodiag | once more without | with a broken probe | step | watched | more | "
        "peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for parallel in timed:
        c = worker[parallel]["cost"]
        s = worker[parallel]["same"]
        apart = " | ".join(f"{s[n]:.1e}" if s[n] else "the same bits" for n in _COMPARED)
        more = f"{100 * (c['watched_ms'] / c['bare_ms'] - 1):+.1f} %"
        peak = "–" if c["peak_gb"] is None else f"{c['peak_gb']:.1f} GB"
        times = f"{c['bare_ms']:.1f} ms | {c['watched_ms']:.1f} ms | {more}"
        lines.append(f"| {parallel}, {worker[parallel]['backend']} | {apart} | {times} | {peak} |")
    return [*lines, ""]


def _failed(part: Mapping[str, Any]) -> str | None:
    if "failed" in part:
        return f"FAILED: {part['failed']}"
    return "HUNG" if part.get("hung") else None


def _steered(part: Mapping[str, Any]) -> str:
    if failed := _failed(part):
        return failed
    alike = (
        "every rank in the same mode at every step" if part["alike"] else "ranks in DIFFERENT modes"
    )
    counts = part["events"]
    happened = ", ".join(
        f"{counts.get(k, 0)} {k}" for k in ("spike", "rollback", "routing", "problem")
    )
    return f"{alike}; events: {happened}"


def _killed(part: Mapping[str, Any]) -> str:
    if failed := _failed(part):
        return failed
    kept = (
        "every completed step of every rank is on record"
        if part["complete"]
        else "STEPS ARE MISSING"
    )
    return f"the others ended {part['seconds_to_the_end']:.1f} s later; {kept}"


def _resumed(part: Mapping[str, Any]) -> str:
    if failed := _failed(part):
        return failed
    begins = part["began_again_at"]
    kept = [[s for s in steps if s != part["lost"]] for steps in part["kept"]]
    right = part["code"] == 0 and set(begins) == {max(set.intersection(*map(set, kept)))}
    went = (
        f"all went on from step {begins[0]}" if right else f"the ranks went on from {begins}, WRONG"
    )
    return f"{went}; it had lost that of step {part['lost']}"


def _same(part: Mapping[str, Any], parallel: str) -> str:
    if failed := _failed(part) or _failed(part[parallel]):
        return failed
    largest = part[parallel]["largest_difference"]
    return f"losses of {part[parallel]['steps']} steps within {largest:.1e}"
