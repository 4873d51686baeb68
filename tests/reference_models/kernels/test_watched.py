"""Statistics that the kernels measure equal those of the torch path, through the whole monitor."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import geodiag
from geodiag.hooks.measure import experts, gains, streams
from geodiag.reference_models.config import ModelConfig
from geodiag.reference_models.data import Batch
from geodiag.reference_models.train import TrainConfig, Trainer
from geodiag.reference_models.transformer import Transformer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALLEST = {"vocab": 32, "channels": 16, "heads": 2, "head_dim": 8, "sequence": 8, "experts": 4}
IDENTITY = ("rank", "attempt", "step", "layer", "site", "expert")
# With sampled tokens, torch has the norms of the sample, and the kernel those of all tokens.
OF_SAMPLE = {"spectral_norm_res": 2e-3, "spectral_norm_res_max": 2e-3}


def recorded(
    path: Path, kernels: str, residual: str = "mhc", sample: int = 1024, **options
) -> geodiag.Run:
    torch.manual_seed(0)
    config = ModelConfig(
        **SMALLEST,
        layers=2,
        expert_dim=8,
        alpha_init=0.5,
        residual=residual,
        streams=4,
        swiglu_limit=0.05,
        kernels=kernels,
        **options,
    )
    with torch.device(DEVICE):
        model = Transformer(config)
    trainer = Trainer(model, TrainConfig(steps=50, sequences=2, warmup=0, lr=1e-4))
    generator = torch.Generator().manual_seed(1)
    with geodiag.attach(
        model, trainer.optimizers, path, quiet=True, probe_every=1 << 30, sample=sample
    ) as monitor:
        for step in range(1):
            ids = torch.randint(32, (2, 9), generator=generator).to(DEVICE)
            done = trainer.step(Batch(step, ids[:, :-1], ids[:, 1:], ("x", "x")))
            monitor.step(done.loss, grad_norm=done.grad_norm, lr=done.lr)
    return geodiag.open_run(path)


def furthest(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, float]:
    """Largest relative difference of each column; infinity where one has a value and the other has
    none.
    """
    found = {}
    for name in a.select_dtypes("number").columns.difference(IDENTITY):
        x, y = a[name].to_numpy(float), b[name].to_numpy(float)
        if (np.isnan(x) != np.isnan(y)).any():
            found[name] = np.inf
        elif not np.isnan(x).all():
            found[name] = float(np.nanmax(np.abs(x - y) / np.maximum(np.abs(y), 1e-3)))
    return found


@pytest.mark.parametrize(("residual", "sample"), [("mhc", 1024), ("mhc", 5), ("hc", 1024)])
def test_what_kernels_measure_is_what_torch_measures(
    tmp_path: Path, residual: str, sample: int
) -> None:
    ours, reference = (recorded(tmp_path / k, k, residual, sample) for k in ("triton", "reference"))
    for table in ("layers", "experts", "matrices"):
        for name, error in furthest(ours.read(table), reference.read(table)).items():
            limit = OF_SAMPLE.get(name, 1e-3) if sample == 5 else 1e-3
            assert error < limit, (table, name, error)


def test_the_kernels_numbers_are_the_ones_on_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this, the torch path alone could pass the test above."""
    for module, fallback in ((gains, "MapBatch"), (streams, "seen_at_place"), (experts, "count")):
        monkeypatch.setattr(
            module, fallback, lambda *_: pytest.fail("the kernels have measured it already")
        )
    rows = recorded(tmp_path / "a", "triton").read("layers")
    for name in (
        "amax_gain_fwd",
        "sinkhorn_residual",
        "branch_share",
        "stream_amax",
        "clamp_gate_rate",
        "act_amax",
    ):
        assert rows[name][rows["site"] == "ffn"].notna().all(), name


@pytest.mark.parametrize("recompute", ["mhc", "layers"])
def test_recomputation_records_the_same(tmp_path: Path, recompute: str) -> None:
    kept, again = (recorded(tmp_path / r, "triton", recompute=r) for r in ("none", recompute))
    for table in ("layers", "experts", "matrices"):
        assert max(furthest(again.read(table), kept.read(table)).values()) < 1e-5, table


@pytest.mark.slow
def test_one_compiled_graph_serves_sampled_steps_and_others(tmp_path: Path) -> None:
    """Kernels read a flag on the device, so the cadence changes nothing that guards a graph."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = ModelConfig(
        **SMALLEST, layers=1, hash_layers=0, expert_dim=16, dtype="bfloat16", kernels="triton"
    )
    with torch.device(DEVICE):
        model = Transformer(config)
    trainer = Trainer(model, TrainConfig(steps=50, sequences=2, warmup=0, lr=1e-4))
    ids = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    batch = Batch(0, ids[:, :-1], ids[:, 1:], ("x", "x"))
    options = {"every": 2, "probe_every": 1 << 30, "probe": (batch.token_ids_BS,)}
    with geodiag.attach(model, trainer.optimizers, tmp_path, quiet=True, **options) as monitor:
        model.compile(backend="eager", fullgraph=True)
        for step in range(3):
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                done = trainer.step(batch)
            monitor.step(done.loss, grad_norm=done.grad_norm, lr=done.lr)
    rows = geodiag.open_run(tmp_path).read("layers")
    assert sorted(set(rows["step"])) == [0, 2]
    for name in ("amax_gain_fwd", "stream_amax", "branch_share", "transport_gain_bwd"):
        assert rows[name].notna().all(), name
