"""Snapshots: everything comes back to the bit, within the budget, from memory and from disk."""

import copy
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemWriter, filesystem

import geodiag
from geodiag.hooks.snapshots.snapshots import Snapshots
from geodiag.hooks.snapshots.state_tree import (
    capture_state,
    join_tensors,
    restore_state,
    split_tensors,
)
from tests.hooks import small


def everything(t: Any) -> list[Tensor]:
    """Weights, buffers and optimizer state, each a copy."""
    tensors = [*t.model.parameters(), *t.model.buffers()]
    for optimizer in t.optimizers:
        tensors += [
            v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)
        ]
    return [x.detach().clone() for x in tensors]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def shots(where: str, folder: Path, *things: Any, **options: Any) -> Snapshots:
    made = Snapshots(*things, where=where, **options)  # type: ignore[arg-type]
    made.keep_in(folder, 0)
    return made


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_everything_comes_back_to_the_bit(tmp_path: Path, where: str) -> None:
    t = small.trainer()
    scheduler = torch.optim.lr_scheduler.StepLR(t.optimizers[2], 3)
    snapshots = shots(where, tmp_path, t.model, t.optimizers, t.progress, scheduler)
    small.train(t, 4)
    scheduler.step()
    before, steps, epoch = everything(t), t.steps_done, scheduler.last_epoch
    places = [p.data_ptr() for p in everything_live(t)]
    random.seed(3)
    snapshots.take(4, {"note": [1, 2]})
    drawn = draws()
    losses = small.train(t, 3, start=4)
    scheduler.step()
    assert not same(everything(t), before), "the twin: training changes everything"
    assert snapshots.restore(4) == {"note": [1, 2]}
    assert same(everything(t), before)
    assert (t.steps_done, scheduler.last_epoch) == (steps, epoch)
    assert draws() == drawn
    assert [p.data_ptr() for p in everything_live(t)] == places, (
        "compiled models hold on to their tensors"
    )
    assert small.train(t, 3, start=4) == losses
    snapshots.close()


def everything_live(t: Any) -> list[Tensor]:
    return [*t.model.parameters(), *t.model.buffers()]


def test_a_snapshot_can_be_used_more_than_once() -> None:
    t = small.trainer()
    snapshots = Snapshots(t.model, t.optimizers, t.progress)
    small.train(t, 2)
    snapshots.take(2, {})
    runs = []
    for _ in range(3):
        runs.append(small.train(t, 3, start=2))
        snapshots.restore(2)
    assert runs[0] == runs[1] == runs[2]


def test_optimizer_state_keeps_its_type_where_torch_would_cast_it() -> None:
    """An optimizer may keep float32 state for bfloat16 weights; its own load_state_dict makes that
    bfloat16.
    """
    weight = nn.Parameter(torch.randn(4, 4).bfloat16())
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    optimizer.state[weight]["momentum_buffer"] = torch.randn(4, 4)
    saved = copy.deepcopy(capture_state(optimizer))
    fresh = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
    restore_state(fresh, saved)
    assert torch.equal(
        fresh.state[weight]["momentum_buffer"], optimizer.state[weight]["momentum_buffer"]
    )
    assert fresh.state[weight]["momentum_buffer"].dtype == torch.float32
    assert fresh.param_groups[0]["lr"] == 0.1
    cast = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
    cast.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert cast.state[weight]["momentum_buffer"].dtype == torch.bfloat16, "the twin"


def test_state_that_an_optimizer_had_not_yet_is_gone_again() -> None:
    t = small.trainer()
    snapshots = Snapshots(t.model, t.optimizers)
    snapshots.take(1, {})
    small.train(t, 1)
    assert any(o.state for o in t.optimizers)
    snapshots.restore(1)
    assert not any(s for o in t.optimizers for s in o.state.values())


def test_buffers_that_no_state_dict_has_come_back_too() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("seen", torch.zeros(1), persistent=False)
    snapshots = Snapshots(model)
    snapshots.take(1, {})
    model.get_buffer("seen").add_(1)
    snapshots.restore(1)
    assert "seen" not in model.state_dict()
    assert model.get_buffer("seen").item() == 0


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_the_newest_are_kept_within_the_budget(tmp_path: Path, where: str) -> None:
    model = nn.Linear(100, 100)  # 40 400 bytes, and a random state of 5056
    snapshots = shots(where, tmp_path, model, keep=9, max_bytes=150_000)
    for step in (10, 20, 30, 40):
        snapshots.take(step, {})
        snapshots.wait()
    assert snapshots.steps == [20, 30, 40]
    snapshots.restore(30)
    assert snapshots.steps == [20, 30], "40 is of a past that is given up"
    with pytest.raises(KeyError, match="no snapshot of step 40; there are 20, 30"):
        snapshots.restore(40)
    snapshots.close()


def test_of_a_large_budget_only_as_many_as_asked_for_are_kept() -> None:
    snapshots = Snapshots(nn.Linear(2, 2), keep=2)
    for step in (1, 2, 3):
        snapshots.take(step, {})
    assert snapshots.steps == [2, 3]


def test_a_model_beyond_the_budget_is_refused_at_once_and_its_optimizer_at_the_first_snapshot() -> (
    None
):
    model = nn.Linear(100, 100)
    with pytest.raises(
        geodiag.GeodiagError, match=r"takes 0.0404 MB and the budget in memory is 0.03 MB; raise"
    ):
        Snapshots(model, max_bytes=30_000)
    optimizer = torch.optim.AdamW(model.parameters())
    snapshots = Snapshots(model, optimizer, max_bytes=60_000)
    model(torch.ones(1, 100)).sum().backward()
    optimizer.step()
    with pytest.raises(geodiag.GeodiagError, match="keep snapshots on disk"):
        snapshots.take(1, {})


@pytest.mark.parametrize("wrong", [{"every": 0}, {"keep": 0}, {"max_bytes": 0}, {"where": "cloud"}])
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"at least 1|in memory or on disk"):
        Snapshots(nn.Linear(1, 1), **wrong)


@pytest.mark.parametrize("things", [(), (3,), (nn.Linear(1, 1), "text")])
def test_what_cannot_be_saved_is_refused(things: tuple) -> None:
    with pytest.raises(ValueError, match=r"cannot save (nothing|int|str)"):
        Snapshots(*things)


def test_another_model_or_optimizer_is_refused_and_left_as_it_is() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 3)
    before = b.weight.detach().clone()
    with pytest.raises(ValueError, match="another model: weight has another shape"):
        restore_state(b, capture_state(a))
    assert torch.equal(b.weight, before)
    with pytest.raises(ValueError, match="is in only one of them"):
        restore_state(nn.Linear(2, 2, bias=False), capture_state(a))
    with pytest.raises(ValueError, match="it has other parameters"):
        restore_state(torch.optim.SGD([a.weight]), capture_state(torch.optim.SGD(a.parameters())))


def test_a_tree_is_put_together_as_it_was_taken_apart() -> None:
    tree = {
        "a": {"b": torch.ones(2)},
        "a.b": torch.zeros(1),
        3: [1, (torch.ones(1), {"x"})],
        "n": None,
    }
    apart, tensors = split_tensors(tree)
    assert list(tensors) == ["a.b", "a.b'", "3.1.0"]
    again = join_tensors(apart, list(tensors.values()))
    assert torch.equal(again["a"]["b"], tree["a"]["b"])  # type: ignore[index]
    assert torch.equal(again["a.b"], tree["a.b"])  # type: ignore[arg-type]
    assert again[3][1][1] == {"x"}
    assert again[3][1][1] is not tree[3][1][1]  # type: ignore[index]


def test_sharded_weights_and_their_optimizer_state_come_back(tmp_path: Path) -> None:
    """Of a sharded weight each rank keeps its own part, and never gathers the whole."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = nn.Linear(6, 4)
        fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        snapshots = shots("disk", tmp_path, model, optimizer)

        def step() -> float:
            loss = model(torch.ones(2, 6)).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        step()
        snapshots.take(1, {})
        losses = [step(), step()]
        snapshots.restore(1)
        assert [step(), step()] == losses
        snapshots.close()
        again = nn.Linear(6, 4)
        fully_shard(again, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
        fresh = torch.optim.AdamW(again.parameters(), lr=0.5)
        resumed = shots("disk", tmp_path, again, fresh)
        resumed.restore(1)
        assert all(hasattr(s["exp_avg"], "to_local") for s in fresh.state.values()), (
            "sharded like its weight"
        )
        model, optimizer = again, fresh
        assert [step(), step()] == losses
        resumed.close()
    finally:
        dist.destroy_process_group()


# -- on disk -------------------------------------------------------------------------------


def test_a_snapshot_on_disk_is_a_torch_distributed_checkpoint_that_anybody_reads(
    tmp_path: Path,
) -> None:
    import torch.distributed.checkpoint as dcp

    model = nn.Linear(3, 2)
    snapshots = shots("disk", tmp_path, model)
    snapshots.take(7, {})
    snapshots.close()
    state = {"0-Linear.tensors.weight": torch.zeros(2, 3)}
    dcp.load(state, checkpoint_id=tmp_path / "snapshots/rank-0/step-00000007", no_dist=True)
    assert torch.equal(state["0-Linear.tensors.weight"], model.weight)


def test_another_process_finds_what_was_written_and_nothing_that_was_cut_off(
    tmp_path: Path,
) -> None:
    t = small.trainer()
    snapshots = shots("disk", tmp_path, t.model, t.optimizers, t.progress)
    small.train(t, 3)
    snapshots.take(3, {"why": "test"})
    expected = everything(t)
    snapshots.close()
    (tmp_path / "snapshots/rank-0/.step-00000009").mkdir()
    fresh = small.trainer(seed=9)
    again = shots("disk", tmp_path, fresh.model, fresh.optimizers, fresh.progress)
    assert again.steps == [3]
    assert not list((tmp_path / "snapshots/rank-0").glob(".step-*"))
    assert again.restore(3) == {"why": "test"}
    assert same(everything(fresh), expected)
    assert small.train(fresh, 3, start=3) == small.train(t, 3, start=3)
    again.close()


def test_a_full_disk_is_said_once_and_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = shots("disk", tmp_path, nn.Linear(2, 2))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(FileSystemWriter, "write_data", refuse)
        snapshots.take(1, {})
        snapshots.wait()
    assert snapshots.steps == []
    with pytest.raises(OSError, match="No space left"):
        snapshots.take(2, {})
    assert snapshots.take(3, {})
    snapshots.wait()
    assert snapshots.steps == [3]
    assert [p.name for p in (tmp_path / "snapshots/rank-0").iterdir()] == ["step-00000003"]
    snapshots.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_for_one_of_torchs_threads_is_full_and_the_snapshot_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = shots("disk", tmp_path, nn.Linear(2, 2), keep=1)
    snapshots.take(1, {})
    snapshots.wait()
    write, refused = filesystem._write_item, threading.Event()

    def full(*args: Any, **more: Any) -> Any:
        if threading.current_thread().name != "geodiag-snapshots":
            refused.set()
            raise OSError(28, "No space left on device")
        assert refused.wait(60), "no other thread took anything"
        return write(*args, **more)

    monkeypatch.setattr(filesystem, "_write_item", full)
    snapshots.take(2, {})
    snapshots.wait()
    assert snapshots.steps == [1]
    with pytest.raises(
        OSError, match=r"\d of the snapshot's \d pieces were not written; free some disk"
    ):
        snapshots.take(3, {})
    snapshots.close()


def test_the_last_snapshot_on_disk_stays_until_the_next_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = geodiag.Snapshots(nn.Linear(2, 2), where="disk", keep=1)
    snapshots.keep_in(tmp_path, rank=0)
    folder, seen, write = tmp_path / "snapshots/rank-0", [], FileSystemWriter.write_data

    def watched(*args: Any, **more: Any) -> Any:
        seen.append(sorted(p.name for p in folder.glob("step-*")))
        return write(*args, **more)

    monkeypatch.setattr(FileSystemWriter, "write_data", watched)
    for step in (1, 2, 3):
        assert snapshots.take(step, {})
        snapshots.wait()
    assert seen == [[], ["step-00000001"], ["step-00000002"]]
    assert snapshots.steps == [3]
    snapshots.close()


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_snapshot_that_was_damaged_says_what_to_do(tmp_path: Path, harm: str) -> None:
    model = nn.Linear(20, 20)
    snapshots = shots("disk", tmp_path, model)
    snapshots.take(1, {})
    snapshots.close()
    folder = tmp_path / "snapshots/rank-0/step-00000001"
    for data in folder.glob("*.distcp"):
        if harm == "cut":
            data.write_bytes(data.read_bytes()[:100])
        else:
            data.unlink()
    again = shots("disk", tmp_path, model)
    with pytest.raises(
        OSError, match=r"step-00000001 is unreadable \(.*\); remove it to use an earlier one"
    ):
        again.restore(1)
    again.close()
