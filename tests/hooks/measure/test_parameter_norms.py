"""Norms over parameters: update ratios against a float64 copy of all weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import geodiag
from geodiag.hooks.adapters import find_layout
from geodiag.hooks.measure import parameter_metrics, parameter_norms
from tests.hooks import small


def slow_ratio(before: dict[str, torch.Tensor], after: nn.Module, prefix: str) -> float:
    """‖Δθ‖ / ‖θ‖ over the parameters under a prefix, in float64."""
    update, weight = 0.0, 0.0
    for name, value in after.named_parameters():
        if name.startswith(prefix) and value.grad is not None:
            then = before[name].double()
            update += float((value.detach().double() - then).square().sum())
            weight += float(then.square().sum())
    return (update / weight) ** 0.5


def recorded(tmp_path: Path, every: Any = None, **changes: Any) -> tuple[Any, dict, nn.Module]:
    """Train two steps; return the layers of the last one, its weights before, and the model."""
    t = small.trainer(**changes)
    every = {"": 1, "layers.update_ratio": 1} if every is None else every
    kept: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        kept.update({n: p.detach().clone() for n, p in t.model.named_parameters()})

    with small.watch(t, tmp_path / "run", every=every) as monitor:
        small.train(t, 1, monitor)
        keep()
        for optimizer in t.optimizers:
            optimizer.zero_grad = lambda *a, **k: None  # the gradients say what was updated
        small.train(t, 1, monitor, start=1)
    rows = geodiag.open_run(tmp_path / "run").read("layers")
    return rows[rows["step"] == 1], kept, t.model


def test_update_ratios_are_those_of_a_float64_copy(tmp_path: Path) -> None:
    rows, before, model = recorded(tmp_path)
    ffn = rows[rows["site"] == "ffn"].set_index("layer")
    for layer in range(3):
        for metric, prefix in (
            ("update_ratio", f"layers.{layer}."),
            ("update_ratio_router", f"layers.{layer}.moe.router."),
            ("update_ratio_experts", f"layers.{layer}.moe.experts."),
        ):
            expected = slow_ratio(before, model, prefix)
            assert expected > 1e-4
            assert ffn[metric][layer] == pytest.approx(expected, rel=1e-5), (layer, metric)
            wrong = slow_ratio(before, model, f"layers.{(layer + 1) % 3}.")
            assert ffn[metric][layer] != pytest.approx(wrong, rel=1e-5), "another layer's"


def test_large_parameters_are_compared_at_evenly_spread_elements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parameter_norms, "_COMPARED", 64)
    rows, before, model = recorded(tmp_path)
    ffn = rows[rows["site"] == "ffn"].set_index("layer")
    for layer in range(3):
        expected = slow_ratio(before, model, f"layers.{layer}.")
        assert ffn["update_ratio"][layer] == pytest.approx(expected, rel=0.3)
        assert ffn["update_ratio"][layer] != pytest.approx(expected, rel=1e-5)


def test_an_odd_stride_visits_every_column() -> None:
    weight = torch.zeros(512, 1024)
    stride = parameter_norms._stride(weight.expand(8, -1, -1))
    columns = torch.arange(0, 8 * weight.numel(), stride) % 1024
    assert stride % 2 == 1
    assert len(columns.unique()) == 1024


def test_weights_are_copied_only_when_a_ratio_is_due(tmp_path: Path) -> None:
    t, copies = small.trainer(), []
    with (
        small.watch(t, tmp_path / "run", every={"": 1, "layers.update_ratio": 3}) as monitor,
        pytest.MonkeyPatch.context() as patch,
    ):
        original = parameter_norms.ParameterNorms._copy_weights
        patch.setattr(
            parameter_norms.ParameterNorms,
            "_copy_weights",
            lambda self, *a: copies.append(monitor.next_step) or original(self, *a),
        )
        small.train(t, 7, monitor)
    assert set(copies) == {0, 3, 6}
    rows = geodiag.open_run(tmp_path / "run").read("layers")
    due = rows[rows["update_ratio"].notna()]["step"].unique()
    assert due.tolist() == [0, 3, 6]


def test_a_parameter_counts_in_its_layer_and_in_its_router_or_experts() -> None:
    t = small.trainer()
    layout = find_layout(t.model)
    owners = parameter_metrics.Owners(layout)
    router = next(layout.routers[1].module.parameters())
    layer = layout.routers[1].layer
    assert owners.of(id(router)) == [layer, owners.first_router + 1]
    embedding = next(p for n, p in t.model.named_parameters() if "layers" not in n)
    assert owners.of(id(embedding)) == [owners.outside]


def test_a_gradient_of_nan_is_a_norm_of_nan_and_not_a_missing_one(tmp_path: Path) -> None:
    t = small.trainer()
    with small.watch(t, tmp_path / "run") as monitor:
        for p in t.model.parameters():
            p.grad = torch.full_like(p, torch.nan)
        for optimizer in t.optimizers:
            optimizer.step()
        monitor.step(1.0)
    run = geodiag.open_run(tmp_path / "run")
    assert np.isnan(run.read_arrow("steps", ["grad_norm"])["grad_norm"][0].as_py())
    layers = run.read_arrow("layers", ["grad_norm"])["grad_norm"].to_pylist()
    assert all(np.isnan(v) for v in layers if v is not None)
    assert any(v is not None for v in layers)


def test_a_module_without_parameters_has_no_ratio(tmp_path: Path) -> None:
    owners = parameter_metrics.Owners(find_layout(small.trainer().model))
    squares = {q: np.ones(owners.count) for q in parameter_metrics.QUANTITIES}
    squares[parameter_metrics.WEIGHT_SQUARES][owners.first_router] = 0
    squares[parameter_metrics.UPDATE_SQUARES][owners.first_router] = 0
    totals = parameter_metrics.ParameterTotals(squares, owners, 1.0)
    values = parameter_metrics.PARAMETERS.step_values(totals)
    of_routers = values["layers.update_ratio_router"]
    assert of_routers[0] is np.ma.masked
    assert of_routers[1:].tolist() == [1.0] * (owners.routers - 1)
