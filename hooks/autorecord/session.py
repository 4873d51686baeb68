"""AutoRecorder: finds the model that an unedited script trains, and starts recording it.

torch's global hooks show every call of a module. The first module that is called with gradient and
holds most of what the optimizers train is the model: its call under way is recorded already. If the
optimizer is created later, or holds only a part, the model is found when the optimizer steps first;
of that step only the loss and the gradient norm are recorded.
"""

import contextlib
import os
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

from geodiag import log
from geodiag.errors import GeodiagError
from geodiag.hooks import torch_internals
from geodiag.hooks.autorecord.auto_monitor import AutoMonitor, run_new_hooks
from geodiag.hooks.autorecord.backward_listener import BackwardListener, StepLosses
from geodiag.hooks.autorecord.clip_listener import ClipListener
from geodiag.hooks.autorecord.model_search import candidates, holds_most, unwrapped
from geodiag.hooks.autorecord.run_config import RunConfig
from geodiag.hooks.autorecord.torch_patches import (
    TorchPatches,
    Wrappers,
    after_init,
    before_compiled_calls,
    before_groups_are_destroyed,
)
from geodiag.hooks.failure_guard import describe


class AutoRecorder:
    """Records one process of a command. An error is reported once, and the program goes on."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._monitor: AutoMonitor | None = None
        """None until the model is found."""
        self._reported: set[str] = set()

        # The search for the model.
        self._created: list[weakref.ref[Optimizer]] = []
        self._called: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        """Modules that were called with gradient; how many optimizers existed when each was
        examined.
        """
        self._unmatched: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        """Optimizers whose model was not found."""
        self._forward_hook: Any = None

        # What the listeners observe of the training.
        self._losses = StepLosses()
        self._clipping = ClipListener()
        backward = BackwardListener(
            run=self._run,
            begins=lambda: self._with_monitor(AutoMonitor.forward_or_backward_begins),
            ends=self._backward_ended,
            updated=lambda: self._with_monitor(AutoMonitor.scaler_updated),
        )
        self._patches = TorchPatches(
            Wrappers(
                optimizer_init=after_init(self._optimizer_created),
                module_compile=before_compiled_calls(self._compiled_module_called),
                backward=backward.wrap_backward,
                scaler_scale=backward.wrap_scale,
                scaler_update=backward.wrap_update,
                clip_grad_norm=self._clipping.wrap,
                destroy_process_group=before_groups_are_destroyed(
                    lambda: self._with_monitor(AutoMonitor.wait)
                ),
            )
        )
        self._step_hooks = [
            register_optimizer_step_pre_hook(lambda optimizer, *_: self._before_step(optimizer)),
            register_optimizer_step_post_hook(lambda optimizer, *_: self._after_step(optimizer)),
        ]
        # torch.compile warns of any global hook; this one does nothing in compiled code.
        warnings.filterwarnings(
            "ignore", r"Using `torch\.compile\(module\)` when there are global hooks"
        )
        self._start_search()

    # -- what the training does --------------------------------------------------------------

    def _optimizer_created(self, optimizer: Optimizer) -> None:
        self._created.append(weakref.ref(optimizer))
        self._start_search()

    @property
    def _optimizers(self) -> list[Optimizer]:
        return [optimizer for ref in self._created if (optimizer := ref()) is not None]

    def _backward_ended(self, losses: list[Tensor]) -> None:
        for loss in losses:
            self._losses.add(loss)
        self._with_monitor(AutoMonitor.backward_ended)

    def _before_step(self, optimizer: Optimizer) -> None:
        if not torch.compiler.is_compiling():
            self._run(lambda: self._search_by_optimizer(optimizer))

    def _after_step(self, optimizer: Optimizer) -> None:
        if torch.compiler.is_compiling():
            # Of all this method does, the compiled step keeps this assignment alone.
            if self._monitor is not None:
                self._monitor.compiled_step_taken = True
            return
        if self._monitor is None:
            self._run(lambda: self._search_by_optimizer(optimizer, step_over=True))
        if self._monitor is None:
            self._losses.discard()
        self._with_monitor(lambda monitor: monitor.optimizer_stepped(optimizer))

    # -- the search --------------------------------------------------------------------------

    def _start_search(self) -> None:
        if self._forward_hook is None and self._monitor is None and self._patches.active:
            self._forward_hook = register_module_forward_pre_hook(self._module_called)

    def _end_search(self) -> None:
        if self._forward_hook is not None:
            self._forward_hook.remove()
            self._forward_hook = None

    def _module_called(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self._run(lambda: self._search_by_call(module, args))

    def _compiled_module_called(self, module: nn.Module, args: Any) -> None:
        if self._monitor is None:
            self._module_called(module, args)
        elif torch.is_grad_enabled():
            self._with_monitor(lambda monitor: monitor.compiled_module_called(module))

    def _search_by_call(self, module: nn.Module, args: Any) -> None:
        """Start recording if `module`, which is being called with gradient, is the model."""
        if self._monitor is not None or self._called.get(module) == len(self._created):
            return
        fresh = module not in self._called
        self._called[module] = len(self._created)
        optimizers = self._optimizers
        if not optimizers or not holds_most(module, optimizers):
            return
        if _ranks_not_connected():
            self._called[module] = -1  # examined again when the process group exists
            return
        if not _has_layout(unwrapped(module), fresh):
            return

        before = set(torch_internals.forward_pre_hooks(module))
        self._start_recording(module, optimizers, fresh)
        if unwrapped(module) is module and torch_internals.compiled_call(module) is None:
            run_new_hooks(module, args, before)

    def _search_by_optimizer(self, optimizer: Optimizer, step_over: bool = False) -> None:
        """Start recording the model of an optimizer that steps: the model was called before.

        With a closure the model is called inside of the step: known when the step is over.
        """
        if self._monitor is not None or optimizer in self._unmatched:
            return
        optimizers = self._optimizers
        found = candidates(self._called, optimizer)
        model = next((m for m in found if _has_layout(unwrapped(m))), next(iter(found), None))
        if model is None and not step_over:
            return
        try:
            if model is None:
                what = f"no module that was called holds what {type(optimizer).__name__} trains"
                raise GeodiagError(
                    f"{what}; where a compiled function calls it, call geodiag.attach before that"
                )
            known = optimizer in optimizers
            self._start_recording(model, optimizers if known else [*optimizers, optimizer])
        except GeodiagError as error:
            self._unmatched.add(optimizer)
            self._config.note(4, str(error))
            self._report(f"{error}; training goes on unrecorded")
            if all(o in self._unmatched for o in optimizers):
                self._end_search()

    def _start_recording(
        self, called: nn.Module, optimizers: list[Optimizer], fresh: bool = False
    ) -> None:
        self._monitor = AutoMonitor(
            self._config,
            called,
            optimizers,
            self._losses,
            self._clipping,
            report=self._report,
            fresh=fresh,
        )
        self._called.clear()
        self._end_search()

    # -- failures ----------------------------------------------------------------------------

    def _with_monitor(self, work: Callable[[AutoMonitor], None]) -> None:
        monitor = self._monitor
        if monitor is not None and not monitor.in_forked_process:
            self._run(lambda: work(monitor))

    def _run(self, work: Callable[[], None]) -> None:
        """Run a callback. The first error ends the recording; the training goes on."""
        if not self._patches.active:
            return
        try:
            work()
        except Exception as error:  # recording must not end a training
            self.stop(error)
            if self._monitor is not None and isinstance(error, GeodiagError):
                raise  # ranks that are in a collective together: the training cannot go on

    def stop(self, error: Exception) -> None:
        """Remove every patch and hook, close the run and report why."""
        self._patches.undo()
        self._end_search()
        for handle in self._step_hooks:
            handle.remove()
        if self._monitor is not None:
            with contextlib.suppress(Exception):  # what is recorded stays, whatever fails here
                self._monitor.abandon()
        why = str(error) if isinstance(error, GeodiagError) else describe(error)
        self._config.note(8, why)
        self._report(f"{why}; training goes on unrecorded")

    def _report(self, line: str) -> None:
        """Log a line once, on the first of several ranks."""
        if line not in self._reported and os.environ.get("RANK", "0") == "0":
            self._reported.add(line)
            log.warning(f"geodiag: {line}")


def _ranks_not_connected() -> bool:
    """True for one rank of several before the process group exists."""
    connected = dist.is_available() and dist.is_initialized()
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and not connected


def _has_layout(model: nn.Module, fresh: bool = False) -> bool:
    from geodiag.hooks.adapters import find_layout

    try:
        find_layout(model, fresh)
    except GeodiagError:
        return False
    return True


def start() -> None:
    """Record this process from here to its end. Called right after the import of torch."""
    AutoRecorder(RunConfig.from_environment())
