"""`geodiag bench`: reproduce the published measurements. Each benchmark parses its own options."""

from importlib import import_module

import typer

BENCHES = {
    "kernels": "Triton kernels against their least memory traffic and other kernels; needs a GPU.",
    "kernels_bytes": "Bytes that each kernel moves, by the GPU's counters; needs a GPU and ncu.",
    "kernels_training": "The same training with Triton and with reference kernels; needs a GPU.",
    "step_time": "Time of a training step by residual, recomputation and recording; needs a GPU.",
    "overhead": "Time and memory that recording adds to a training step.",
    "cascade": "Attribution of planted faults: stage, layer, lead time and false alarms.",
    "cascade_speed": "Time and memory of the cascade of a long, deep run.",
    "export_speed": "Time and memory of the export of a long, deep run.",
    "dashboard": "Response times of the page on a long run, in a real browser.",
    "probes": "Cost of each probe alone, and of all at their default cadence.",
    "rollback": "Cost of snapshots and of a rollback; whether the state is restored to the bit.",
    "routing": "Effect of rollback and of routing by older weights on spikes, same seeds and data.",
    "routing_cost": "Time that routing by older weights adds to a training step, off and on.",
    "ranks": "Several ranks: cost of recording, equal losses and decisions, a killed rank.",
    "routing_replay": "Whether a natural spike returns after one change, and after noise alone.",
    "spikes": "The spike detector and published rules on labelled loss curves.",
}
"""Benchmark → what it measures; each is a module of benchmarks/ with a `main(argv)`."""

bench = typer.Typer(
    name="bench", no_args_is_help=True, help="Reproduce the published measurements."
)


def _add(name: str, help: str) -> None:
    # The benchmark has a parser of its own, which also handles --help.
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
