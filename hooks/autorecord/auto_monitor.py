"""The recording of a script that nobody edited: a monitor that is told of a step when the
optimizers have taken one.
"""

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from geodiag.errors import GeodiagError
from geodiag.hooks.autorecord.backward_listener import Losses
from geodiag.hooks.autorecord.clip_listener import Norms
from geodiag.hooks.autorecord.model_search import belongs, steps_taken, unwrapped
from geodiag.hooks.autorecord.process_exit import Ending
from geodiag.hooks.autorecord.rank_rendezvous import all_here, of_the_first
from geodiag.hooks.autorecord.run_config import Orders
from geodiag.hooks.autorecord.step_boundaries import Rounds
from geodiag.hooks.probes.token_trace import parse_trace
from geodiag.run import Status

if TYPE_CHECKING:
    from geodiag.hooks.monitor import Monitor

Tell = Callable[[str], None]


class Recording:
    """One model's training. `called` is what the script calls, `losses` and `norms` what was heard
    so far; `fresh`, that this is its first call.

    GeodiagError where the model cannot be watched, or the run directory cannot be written.
    """

    def __init__(
        self,
        orders: Orders,
        called: nn.Module,
        optimizers: Sequence[Optimizer],
        losses: Losses,
        norms: Norms,
        tell: Tell,
        fresh: bool,
    ) -> None:
        self._losses, self._norms, self._tell, self._pid = losses, norms, tell, os.getpid()
        self.unheard = False
        """Whether an optimizer has stepped whose step is compiled: the round ends when what comes
        next begins.
        """
        self._called, model = called, unwrapped(called)
        self._weights = {id(p) for p in model.parameters()}
        self._trained = {id(p) for p in model.parameters() if p.requires_grad}
        own = [o for o in optimizers if belongs(o, self._weights)]
        self._known = {id(o): o in own for o in optimizers}
        self._rounds = Rounds(id(o) for o in own)
        self._monitor: Monitor = _attached(orders, model, own, fresh)
        # Before the monitor's own hooks: what a forward shows belongs to the step that it begins.
        called.register_forward_pre_hook(
            lambda *_: self.goes_on() if torch.is_grad_enabled() else None, prepend=True
        )
        Ending(self.close, elsewhere=lambda: atexit.unregister(self._monitor.close))

    # -- as the training goes ------------------------------------------------------------------

    @property
    def elsewhere(self) -> bool:
        """Whether this is a process that was forked off, a data loader's worker: it takes no part."""
        return os.getpid() != self._pid

    def enters(self, module: nn.Module) -> None:
        """A module that is compiled in place is called, whose own hooks are inside of what is
        compiled.
        """
        if module is self._called:
            self.goes_on()

    def goes_on(self) -> None:
        """A forward or a backward begins."""
        if not torch.compiler.is_compiling() and (self.unheard or self._rounds.next()):
            self._end_round()

    def differentiated(self) -> None:
        """A backward is over."""
        if self._rounds.complete:  # optimizers that step inside of the backward
            self._end_round()
        else:
            self._rounds.differentiated()

    def stepped(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped, the model's or another's."""
        if id(optimizer) not in self._known:
            self._known[id(optimizer)] = belongs(optimizer, self._weights)
        if not self._known[id(optimizer)]:
            self._losses.pass_by()
            self._tell(
                "an optimizer of other weights steps too; what that one trains is not recorded"
            )
        elif self._rounds.stepped(id(optimizer)) and torch._C._current_graph_task_id() == -1:
            self._end_round()

    def scaler_updated(self) -> None:
        """A round ends here at the latest; a step that the scaler skipped, its gradient being
        infinite, is one, too.
        """
        if self._losses.pending or self._rounds.next():
            self._end_round()

    def _end_round(self) -> None:
        self._rounds.over()
        self.unheard = False
        loss, norm = self._losses.take(), self._norms.take(self._trained)
        if loss is None:
            self._tell(
                "an optimizer stepped before any backward of a single number; such steps are not recorded"
            )
            return
        self._monitor.step(loss, grad_norm=norm)

    def wait(self) -> None:
        """The ranks are about to part: they hear of each other's last step before that."""
        self.goes_on()
        self._monitor.wait()

    def close(self, status: Status) -> None:
        """Closes the run; a round that waited for more steps is on record, too."""
        try:
            self.goes_on()
        finally:
            self._monitor.close(status)

    def give_up(self) -> None:
        """Something failed that was not foreseen: the run ends here, the training does not."""
        self._monitor.close("interrupted")


def _attached(
    orders: Orders, model: nn.Module, optimizers: list[Optimizer], fresh: bool
) -> "Monitor":
    if "geodiag.hooks.monitor" in sys.modules:
        raise GeodiagError("the script attaches geodiag itself, and its own run is the record")
    if not all_here():
        raise GeodiagError(
            "not every rank of the process group trains a model, and geodiag watches all of them or none"
        )
    orders.note(5, "the training ended before its first step was over")
    path = of_the_first(orders.path)
    if (
        path != orders.path
    ):  # `geodiag run` was started on each machine, or for each rank, and named its own
        orders.note(9, f"the ranks record together, into {path}")
    from geodiag.hooks.attach import attach

    return attach(
        model,
        optimizers,
        path,
        every=orders.every,
        probe_every=orders.probe_every,
        layers=orders.layers,
        trace=parse_trace(orders.trace),
        first_step=steps_taken(optimizers),
        config={"command": list(orders.command)},
        fresh=fresh,
    )


def catch_up(module: nn.Module, args: tuple, known: set[int]) -> None:
    """Lets the hooks that came to `module` just now, in the middle of its call, take part in that
    call.

    Those that want the keyword arguments get them when the call is over: torch's global hooks are
    not told of them.
    """
    late: list[Callable[..., Any]] = []
    for key, hook in list(module._forward_pre_hooks.items()):
        if key in known:
            continue
        if key in module._forward_pre_hooks_with_kwargs:
            late.append(hook)
        else:
            hook(module, args)

    def told(_: nn.Module, args: tuple, kwargs: dict[str, Any], _output: Any) -> None:
        handle.remove()
        for hook in late:
            hook(module, args, kwargs)

    handle = module.register_forward_hook(told, with_kwargs=True)
