"""The onlooker: finds the model that a script trains, with no word from it, and begins its
recording.

It looks on through torch's global hooks until a module is called with gradient that holds most of
what the optimizers train; that call is already on record. Where the optimizer is made later, or
holds but a part, the model is found when the optimizer first steps: of that step only the loss and
the gradient norm are on record.
"""

import contextlib
import os
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from geodiag.errors import GeodiagError
from geodiag.hooks.autorecord.auto_monitor import Recording, catch_up
from geodiag.hooks.autorecord.backward_listener import Ear, Losses
from geodiag.hooks.autorecord.clip_listener import Norms
from geodiag.hooks.autorecord.model_search import best, holds_most, unwrapped
from geodiag.hooks.autorecord.rank_rendezvous import before_they_part
from geodiag.hooks.autorecord.run_config import Orders
from geodiag.hooks.autorecord.torch_patches import hear_of_compiled_calls, hear_of_optimizers


class Onlooker:
    """One process of a command. Whatever fails in here is said once, and the program goes on
    without it.
    """

    def __init__(self, orders: Orders) -> None:
        self._orders, self._losses, self._norms = orders, Losses(), Norms()
        self._recording: Recording | None = None
        self._told: set[str] = set()
        self._born: list[weakref.ref[Optimizer]] = []
        self._called: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        """Modules that were called with gradient, and how many optimizers had been made when they
        were looked at.
        """
        self._hopeless: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Optimizers whose model was looked for in vain."""
        self._looking: Any = None
        self._ear = Ear(
            guarded=self._guarded,
            begins=lambda: self._recorded(Recording.goes_on),
            ends=self._differentiated,
            updated=lambda: self._recorded(Recording.scaler_updated),
        )
        self._handles = [
            register_optimizer_step_pre_hook(lambda optimizer, *_: self._will_step(optimizer)),
            register_optimizer_step_post_hook(lambda optimizer, *_: self._stepped(optimizer)),
        ]
        hear_of_optimizers(self._made)
        hear_of_compiled_calls(self._compiled_call)
        before_they_part(lambda: self._recorded(Recording.wait))
        # torch.compile warns of any global hook; this one does nothing in what is compiled.
        warnings.filterwarnings(
            "ignore", r"Using `torch\.compile\(module\)` when there are global hooks"
        )
        self._look()

    # -- what is heard of ----------------------------------------------------------------------

    def _made(self, optimizer: Optimizer) -> None:
        self._born.append(weakref.ref(optimizer))
        self._look()

    @property
    def _optimizers(self) -> list[Optimizer]:
        return [optimizer for ref in self._born if (optimizer := ref()) is not None]

    def _differentiated(self, losses: list[Tensor]) -> None:
        for loss in losses:
            self._losses.add(loss)
        self._recorded(Recording.differentiated)

    def _will_step(self, optimizer: Optimizer) -> None:
        if not torch.compiler.is_compiling():
            self._guarded(lambda: self._steps(optimizer))

    def _stepped(self, optimizer: Optimizer) -> None:
        if torch.compiler.is_compiling():
            if self._recording is not None:
                self._recording.unheard = True  # all that the compiled step will do of this
            return
        if self._recording is None:
            self._guarded(lambda: self._steps(optimizer, over=True))
        if self._recording is None:
            self._losses.pass_by()
        self._recorded(lambda recording: recording.stepped(optimizer))

    # -- the search ----------------------------------------------------------------------------

    def _look(self) -> None:
        if self._looking is None and self._recording is None and self._ear.on:
            self._looking = register_module_forward_pre_hook(self._forward)

    def _look_away(self) -> None:
        if self._looking is not None:
            self._looking.remove()
            self._looking = None

    def _forward(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self._guarded(lambda: self._called_with_gradient(module, args))

    def _compiled_call(self, module: nn.Module, args: Any) -> None:
        if self._recording is None:
            self._forward(module, args)
        elif torch.is_grad_enabled():
            self._recorded(lambda recording: recording.enters(module))

    def _called_with_gradient(self, module: nn.Module, args: Any) -> None:
        if self._recording is not None or self._called.get(module) == len(self._born):
            return
        fresh = module not in self._called
        self._called[module] = len(self._born)
        optimizers = self._optimizers
        if not optimizers or not holds_most(module, optimizers):
            return
        if _ranks_are_still_apart():
            self._called[module] = -1  # looked at again when they are together
            return
        if not _has_layout(unwrapped(module), fresh):
            return
        known = set(module._forward_pre_hooks)
        self._begin(module, optimizers, fresh)
        if unwrapped(module) is module and module._compiled_call_impl is None:
            catch_up(module, args, known)

    def _steps(self, optimizer: Optimizer, over: bool = False) -> None:
        """The optimizer is about to step: its model has been called by now; with a closure, until
        the step is over.
        """
        if self._recording is not None or optimizer in self._hopeless:
            return
        optimizers = self._optimizers
        candidates = best(self._called, optimizer)
        found = next(
            (m for m in candidates if _has_layout(unwrapped(m))), next(iter(candidates), None)
        )
        if found is None and not over:
            return
        try:
            if found is None:
                what = f"no module that was called holds what {type(optimizer).__name__} trains"
                raise GeodiagError(
                    f"{what}; where a compiled function calls it, call geodiag.attach before that"
                )
            self._begin(found, optimizers if optimizer in optimizers else [*optimizers, optimizer])
        except GeodiagError as e:
            self._hopeless.add(optimizer)
            self._orders.note(4, str(e))
            self._say(f"{e}; training goes on unrecorded")
            if all(o in self._hopeless for o in optimizers):
                self._look_away()

    def _begin(self, called: nn.Module, optimizers: list[Optimizer], fresh: bool = False) -> None:
        heard = self._losses, self._norms
        self._recording = Recording(self._orders, called, optimizers, *heard, self._say, fresh)
        self._called.clear()
        self._look_away()

    # -- whatever fails ------------------------------------------------------------------------

    def _recorded(self, work: Callable[[Recording], None]) -> None:
        recording = self._recording
        if recording is not None and not recording.elsewhere:
            self._guarded(lambda: work(recording))

    def _guarded(self, work: Callable[[], None]) -> None:
        if not self._ear.on:
            return
        try:
            work()
        except (
            Exception
        ) as e:  # looking on must not end a training: said once, and no more is looked at
            self._give_up(e)
            if self._recording is not None and isinstance(e, GeodiagError):
                raise  # the ranks stand in the middle of what they do together: it cannot go on

    def _give_up(self, error: Exception) -> None:
        self._ear.close()
        self._look_away()
        for handle in self._handles:
            handle.remove()
        if self._recording is not None:
            with contextlib.suppress(
                Exception
            ):  # what is on record already stays, whatever else fails
                self._recording.give_up()
        why = (
            str(error)
            if isinstance(error, GeodiagError)
            else f"{type(error).__name__}: {error}".splitlines()[0]
        )
        self._orders.note(8, why)
        self._say(f"{why}; training goes on unrecorded")

    def _say(self, what: str) -> None:
        """Says it once, of several ranks the first one."""
        if what not in self._told and os.environ.get("RANK", "0") == "0":
            self._told.add(what)
            print(f"geodiag: {what}", file=sys.stderr, flush=True)


def _ranks_are_still_apart() -> bool:
    """Whether this is one rank of several that do not know each other yet."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and not (
        dist.is_available() and dist.is_initialized()
    )


def _has_layout(model: nn.Module, fresh: bool = False) -> bool:
    from geodiag.hooks.adapters import find_layout

    try:
        find_layout(model, fresh)
    except GeodiagError:
        return False
    return True


def look_out() -> None:
    """Looks on from here to the end of the process: right behind the import of torch, before the
    program goes on.
    """
    Onlooker(Orders.of_environment())
