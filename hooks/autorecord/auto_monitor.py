"""AutoMonitor: a monitor of an unedited script, which takes a step when the optimizers have."""

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from geodiag.errors import GeodiagError
from geodiag.hooks import torch_internals
from geodiag.hooks.autorecord.backward_listener import StepLosses
from geodiag.hooks.autorecord.clip_listener import ClipListener
from geodiag.hooks.autorecord.model_search import steps_taken, trains_any, unwrapped
from geodiag.hooks.autorecord.process_exit import ProcessExit
from geodiag.hooks.autorecord.rank_rendezvous import all_ranks_present, value_of_rank_0
from geodiag.hooks.autorecord.run_config import RunConfig
from geodiag.hooks.autorecord.step_boundaries import StepBoundaries
from geodiag.hooks.probes.token_trace import parse_trace
from geodiag.run import Status

if TYPE_CHECKING:
    from geodiag.hooks.monitor import Monitor


class AutoMonitor:
    """Records the training of one model.

    called: the module as the script calls it. losses, clipping: what was collected so far.
    fresh: this is the first call of the module. report: logs a line once.

    GeodiagError if geodiag cannot attach to the model, or the run directory cannot be written.
    """

    def __init__(
        self,
        config: RunConfig,
        called: nn.Module,
        optimizers: Sequence[Optimizer],
        losses: StepLosses,
        clipping: ClipListener,
        report: Callable[[str], None],
        fresh: bool,
    ) -> None:
        self._losses = losses
        self._clipping = clipping
        self._report = report
        self._pid = os.getpid()
        self.compiled_step_taken = False
        """True after a compiled optimizer step: the step ends when the next forward begins."""

        self._called = called
        model = unwrapped(called)
        self._weights = {id(p) for p in model.parameters()}
        self._trained = {id(p) for p in model.parameters() if p.requires_grad}
        own = [o for o in optimizers if trains_any(o, self._weights)]
        self._trains_model = {id(o): o in own for o in optimizers}
        self._boundaries = StepBoundaries(id(o) for o in own)
        self._monitor: Monitor = _attach(config, model, own, fresh)
        # Before the monitor's own hooks: what a forward shows belongs to the step that it begins.
        called.register_forward_pre_hook(
            lambda *_: self.forward_or_backward_begins() if torch.is_grad_enabled() else None,
            prepend=True,
        )
        ProcessExit(self.close, in_fork=lambda: atexit.unregister(self._monitor.close))

    @property
    def in_forked_process(self) -> bool:
        """True in a fork of the training's process, a data loader's worker: it records nothing."""
        return os.getpid() != self._pid

    # -- what the training does --------------------------------------------------------------

    def compiled_module_called(self, module: nn.Module) -> None:
        """A module compiled in place is called. Its own hooks do not run: they are compiled too."""
        if module is self._called:
            self.forward_or_backward_begins()

    def forward_or_backward_begins(self) -> None:
        """End the step before, if it waited for more optimizers."""
        if torch.compiler.is_compiling():
            return
        if self.compiled_step_taken or self._boundaries.ended_by_next_pass():
            self._end_step()

    def backward_ended(self) -> None:
        if self._boundaries.complete:  # optimizers that step inside of the backward
            self._end_step()
        else:
            self._boundaries.backward_ended()

    def optimizer_stepped(self, optimizer: Optimizer) -> None:
        """Any optimizer stepped, this model's or another's."""
        key = id(optimizer)
        if key not in self._trains_model:
            self._trains_model[key] = trains_any(optimizer, self._weights)
        if not self._trains_model[key]:
            self._losses.discard()
            self._report(
                "an optimizer of other weights steps too; what that one trains is not recorded"
            )
        elif self._boundaries.optimizer_stepped(key) and not torch_internals.in_backward():
            self._end_step()

    def scaler_updated(self) -> None:
        """End the step: also one that the scaler skipped, because its gradient was infinite."""
        if self._losses.pending or self._boundaries.ended_by_next_pass():
            self._end_step()

    def _end_step(self) -> None:
        self._boundaries.reset()
        self.compiled_step_taken = False
        loss = self._losses.take()
        norm = self._clipping.take(self._trained)
        if loss is None:
            self._report(
                "an optimizer stepped before any backward of a single number; "
                "such steps are not recorded"
            )
            return
        self._monitor.step(loss, grad_norm=norm)

    # -- the end -----------------------------------------------------------------------------

    def wait(self) -> None:
        """Record the last step on all ranks, before their process group is destroyed."""
        self.forward_or_backward_begins()
        self._monitor.wait()

    def close(self, status: Status) -> None:
        """Record a step that waited for more optimizers, and close the run."""
        try:
            self.forward_or_backward_begins()
        finally:
            self._monitor.close(status)

    def abandon(self) -> None:
        """Close the run after an error of geodiag; the training goes on."""
        self._monitor.close("interrupted")


def _attach(
    config: RunConfig, model: nn.Module, optimizers: list[Optimizer], fresh: bool
) -> "Monitor":
    if "geodiag.hooks.monitor" in sys.modules:
        raise GeodiagError("the script attaches geodiag itself, and its own run is the record")
    if not all_ranks_present():
        raise GeodiagError(
            "not every rank of the process group trains a model, "
            "and geodiag records either all of them or none"
        )
    config.note(5, "the training ended before its first step was over")
    path = value_of_rank_0(config.path)
    if path != config.path:
        # `geodiag run` was started on each machine or for each rank, and named a run for each.
        config.note(9, f"the ranks record together, into {path}")

    from geodiag.hooks.attach import attach

    return attach(
        model,
        optimizers,
        path,
        every=config.every,
        probe_every=config.probe_every,
        layers=config.layers,
        trace=parse_trace(config.trace),
        first_step=steps_taken(optimizers),
        config={"command": list(config.command)},
        fresh=fresh,
    )


def run_new_hooks(module: nn.Module, args: tuple, before: set[int]) -> None:
    """Run the forward pre-hooks that were registered while `module` is being called.

    before: ids of the hooks that ran. Hooks with keyword arguments run at the end of the call,
    since torch's global hooks do not receive the keyword arguments.
    """
    late: list[Callable[..., Any]] = []
    for key, (hook, takes_kwargs) in torch_internals.forward_pre_hooks(module).items():
        if key in before:
            continue
        if takes_kwargs:
            late.append(hook)
        else:
            hook(module, args)

    def at_the_end(_: nn.Module, args: tuple, kwargs: dict[str, Any], _output: Any) -> None:
        handle.remove()
        for hook in late:
            hook(module, args, kwargs)

    handle = module.register_forward_hook(at_the_end, with_kwargs=True)
