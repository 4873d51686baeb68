"""The patches of torch: each calls its callback, and one `undo`, or a failure, takes back all."""

import inspect
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import utils
from torch.optim.optimizer import _global_optimizer_pre_hooks

from geodiag.hooks.autorecord import run_config, session, sitecustomize_hook
from geodiag.hooks.autorecord.run_config import RunConfig
from geodiag.hooks.autorecord.session import AutoRecorder
from geodiag.hooks.autorecord.torch_patches import (
    TorchPatches,
    Wrappers,
    after_init,
    before_compiled_calls,
    before_groups_are_destroyed,
)
from tests.hooks import small

PATCHED = (
    (torch.optim.Optimizer, "__init__"),
    (nn.Module, "compile"),
    (torch.autograd, "backward"),
    (GradScaler, "scale"),
    (GradScaler, "update"),
    (utils, "clip_grad_norm_"),
    (utils.clip_grad, "clip_grad_norm_"),
    (dist, "destroy_process_group"),
)


def functions() -> list[Any]:
    return [getattr(owner, name) for owner, name in PATCHED]


@pytest.fixture
def originals() -> Iterator[list[Any]]:
    """torch's own functions, put back whatever a test does."""
    before = functions()
    with warnings.catch_warnings():
        yield before
    for (owner, name), original in zip(PATCHED, before, strict=True):
        setattr(owner, name, original)


def unchanged(original: Any) -> Any:
    return lambda *args, **kwargs: original(*args, **kwargs)


def wrappers(**changed: Any) -> Wrappers:
    names = inspect.signature(Wrappers).parameters
    return Wrappers(**{name: changed.get(name, unchanged) for name in names})


def changed(originals: list[Any]) -> list[bool]:
    return [a is not b for a, b in zip(functions(), originals, strict=True)]


def test_one_undo_takes_back_all(originals: list[Any]) -> None:
    patches = TorchPatches(wrappers())
    assert all(changed(originals))
    patches.undo()
    assert not any(changed(originals))


def test_a_patch_that_was_patched_again_stays_without_effect(originals: list[Any]) -> None:
    calls: list[Any] = []
    patches = TorchPatches(wrappers(optimizer_init=after_init(calls.append)))
    ours = torch.optim.Optimizer.__init__
    theirs = unchanged(ours)
    torch.optim.Optimizer.__init__ = theirs  # type: ignore[method-assign]
    patches.undo()
    assert torch.optim.Optimizer.__init__ is theirs
    torch.optim.SGD(nn.Linear(2, 2).parameters())
    assert calls == []
    assert changed(originals) == [True] + [False] * 7


def test_optimizers_are_reported_after_their_creation(originals: list[Any]) -> None:
    calls: list[Any] = []
    TorchPatches(wrappers(optimizer_init=after_init(calls.append)))
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters())
    assert calls == [optimizer]


def test_calls_of_modules_compiled_in_place_are_reported(originals: list[Any]) -> None:
    calls: list[Any] = []
    TorchPatches(
        wrappers(module_compile=before_compiled_calls(lambda m, args: calls.append((m, args))))
    )
    module = nn.Linear(2, 2)
    module.compile(backend="eager")
    x = torch.ones(1, 2)
    module(x)
    assert calls == [(module, (x,))]


def test_the_callback_comes_before_all_groups_end_and_not_when_one_does(
    originals: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[object] = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda group=None: order.append(group))
    wrap = before_groups_are_destroyed(lambda: order.append("callback"))
    patches = TorchPatches(wrappers(destroy_process_group=wrap))
    dist.destroy_process_group()
    dist.destroy_process_group("one of them")
    assert order == ["callback", None, "one of them"]
    patches.undo()


@pytest.mark.parametrize("fails", [True, False])
def test_a_failure_takes_back_all_patches_and_hooks(
    originals: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fails: bool,
) -> None:
    def holds_most(*_: Any) -> bool:
        if fails:
            raise ZeroDivisionError("a bug of geodiag")
        return False

    monkeypatch.setattr(session, "holds_most", holds_most)
    hooks = torch.nn.modules.module._global_forward_pre_hooks
    step_hooks = _global_optimizer_pre_hooks
    before = len(hooks), len(step_hooks)
    recorder = AutoRecorder(
        RunConfig(path=str(tmp_path / "run"), notes=str(tmp_path), probe_every=10)
    )
    try:
        model = small.Blocks()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        assert all(changed(originals))
        assert (len(hooks), len(step_hooks)) == (before[0] + 1, before[1] + 1)
        model(small.tokens(0)).sum().backward()
        assert changed(originals) == [not fails] * len(PATCHED)
        assert ((len(hooks), len(step_hooks)) == before) == fails
        if fails:
            optimizer.step()
            assert capsys.readouterr().err.count("a bug of geodiag; training goes on") == 1
    finally:
        recorder.stop(RuntimeError("the test is over"))


# -- the file that stands alone ------------------------------------------------------------


def test_the_copies_in_the_sitecustomize_file_agree_with_run_config() -> None:
    assert sitecustomize_hook.VARIABLE == run_config.VARIABLE
    ours, copied = (inspect.getsource(m.write_note) for m in (run_config, sitecustomize_hook))
    assert copied == ours


def test_the_configuration_survives_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(
        path="/runs/a", notes="/notes", probe_every=5, every={"loss": 2}, command=("python", "a.py")
    )
    for name, value in config.environment().items():
        monkeypatch.setenv(name, value)
    assert RunConfig.from_environment() == config
    assert json.loads(config.environment()[run_config.VARIABLE])["notes"] == "/notes"
