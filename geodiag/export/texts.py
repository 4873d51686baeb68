"""Texts for TensorBoard: events and configuration as Markdown, single values as hyperparameters."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from geodiag.events import details
from geodiag.jsonable import jsonable

_LONG = {"registry", "cadence"}
"""Parts of the manifest that are left out: they are long, and exported elsewhere."""


def configuration(manifest: Mapping[str, Any]) -> str:
    """Return the manifest, without its longest parts, as a block of JSON."""
    config = manifest.get("config")
    short = {k: v for k, v in manifest.items() if k not in _LONG}
    if isinstance(config, Mapping):
        short["config"] = {k: v for k, v in config.items() if k not in _LONG}
    return _block(short)


def hyperparameters(manifest: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Return every single value of the configuration by its path, such as `options.lr`."""
    config = manifest.get("config")
    return dict(_leaves("", config)) if isinstance(config, Mapping) else {}


def event_text(row: Mapping[str, Any]) -> str:
    """Return one event as Markdown: the message and its details."""
    more = details(row["data"])
    return f"**{row['kind']}** at step {row['step']}: {row['message']}" + (
        f"\n\n{_block(more)}" if more else ""
    )


def trail(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return all events as one table: of many texts TensorBoard shows only a sample."""
    lines = ["| step | kind | what happened |", "|---:|---|---|"]
    for row in sorted(rows, key=lambda r: r["step"]):
        message = " ".join(str(row["message"]).replace("|", "\\|").split())
        lines.append(f"| {row['step']} | {row['kind']} | {message} |")
    return "\n".join(lines)


def _block(data: Any) -> str:
    """Return JSON that Markdown does not change."""
    text = json.dumps(jsonable(data), indent=1, ensure_ascii=False)
    return "\n".join(f"    {line}" for line in text.splitlines())


def _leaves(path: str, data: Mapping[str, Any]) -> Iterator[tuple[str, bool | float | str]]:
    for name, value in data.items():
        here = f"{path}.{name}" if path else str(name)
        if name in _LONG or value is None:
            continue
        if isinstance(value, Mapping):
            yield from _leaves(here, value)
        else:
            yield (
                here,
                value
                if isinstance(value, bool | int | float | str)
                else json.dumps(jsonable(value)),
            )
