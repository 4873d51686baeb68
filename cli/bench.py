"""`geodiag bench`: the published numbers, reproducible. Each bench parses its own options."""

from importlib import import_module

import typer

BENCHES = {
    "kernels": "The Triton kernels of the reference model against the byte floor and their peers; needs a GPU.",
    "kernels_bytes": "Bytes that each kernel of a site moves, by the GPU's counters; needs a GPU and ncu.",
    "kernels_training": "A training on Triton kernels against the same on reference kernels; needs a GPU.",
    "step_time": "A training step of the reference model: residuals, recomputation, the monitor; needs a GPU.",
    "overhead": "What recording costs a training step.",
    "cascade": "What the cascade says of planted faults: stage, layer, lead, and false alarms.",
    "cascade_speed": "How long the cascade of a long, deep run takes, and how much memory.",
    "export_speed": "How long the export of a long, deep run takes, and how much memory.",
    "dashboard": "How fast the page is on a long run, in a real browser.",
    "probes": "What the probes cost: each alone, and at their default cadence as a share of a step.",
    "rollback": "What snapshots and going back cost, and whether what comes back is the same to the bit.",
    "routing": "What rolling back and routing by older weights buys, on the same seeds and data.",
    "routing_cost": "What routing by older weights costs a training step: off, on, and where the time goes.",
    "ranks": "Several ranks: cost of recording, the same losses and decisions, and a rank that is killed.",
    "routing_replay": "Whether a natural spike comes back when one thing is changed, and when nothing but noise is.",
    "spikes": "The spike detector and the public rules on labelled loss curves.",
}
"""Bench → what it measures; each is a module of benchmarks/ with a `main(argv)`."""

bench = typer.Typer(
    name="bench", no_args_is_help=True, help="Measure: the published numbers, reproducible."
)


def _add(name: str, help: str) -> None:
    # The bench's own parser answers --help too.
    @bench.command(
        name,
        help=help,
        add_help_option=False,
        context_settings={
            "allow_extra_args": True,
            "ignore_unknown_options": True,
            "help_option_names": [],
        },
    )
    def _run(context: typer.Context) -> None:
        import_module(f"geodiag.benchmarks.{name}").main(context.args)


for _name, _help in BENCHES.items():
    _add(_name, _help)
