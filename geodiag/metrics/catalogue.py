"""docs/metrics.md, printed from the registry by `make docs`; a test compares the two."""

from geodiag.events import KINDS
from geodiag.metrics.schema import SCHEMAS, Metric, metrics_of

_ABOUT = {
    "steps": "One row a step.",
    "layers": "One row a residual site of a sampled step: `layer`, then `site` (`attn`, `ffn`).",
    "experts": "One row an expert of a sampled step.",
    "matrices": "Token means of the residual maps: `map` (`pre`, `post`, `res`), row `i`, "
    "column `j`, `value`.",
    "tokens": "A few traced tokens of the probe batch, one row a site: `token` is the place in the "
    "batch, `token_id` its id in the vocabulary, `experts` the chosen ones, heaviest first.",
    "domains": "One row a domain that the loader names, of a step's batch or of the probe batch.",
    "events": "What happened, when, where and why.",
}
_STAGES = {1: "1 curvature", 2: "2 routing", 3: "3 amplification"}


def page() -> str:
    """Return the page as Markdown."""
    keys = (
        "Every row has `rank`, `attempt` and `step`; null is *not sampled* or *not applicable*, "
        "NaN is a measured NaN."
    )
    reduced = (
        "*Every* is the default cadence in steps (`--every` changes it); *reduced by* says how "
        "micro-batches, then ranks, become one value."
    )
    parts = [
        "# What geodiag records",
        "Printed from `geodiag/metrics/registry.py` by `make docs`.",
        keys,
        reduced,
    ]
    for table in SCHEMAS:
        parts.append(f"## Table `{table}`\n\n{_ABOUT[table]}")
        if metrics_of(table):
            head = (
                "| metric | unit | what it is | healthy | stage | every | reduced by | source |\n"
                + "|---" * 8
                + "|"
            )
            parts.append("\n".join([head, *map(_row, metrics_of(table))]))
    kinds = [f"| `{kind}` | {meaning} |" for kind, meaning in KINDS.items()]
    parts.append("\n".join(["### Kinds of events\n", "| kind | meaning |", "|---|---|", *kinds]))
    return "\n\n".join(parts) + "\n"


def _row(m: Metric) -> str:
    low, high = m.healthy or (None, None)
    healthy = f"≤ {high:g}" if high is not None else f"≥ {low:g}" if low is not None else ""
    if low is not None and high is not None:
        healthy = f"{low:g} to {high:g}"
    cells = [f"`{m.name}`", m.unit, m.help, healthy, _STAGES.get(m.stage or 0, ""), f"{m.every}"]
    cells += [m.micro if m.micro == m.ranks else f"{m.micro}, {m.ranks}", m.source]
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


if __name__ == "__main__":
    print(page(), end="")
