"""What a run asks to have measured: cadence, layers, traced tokens, domains and data shift, through
a real training.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import geodiag
from geodiag.errors import GeodiagError
from geodiag.hooks.measure.data_shift import REMEMBERED
from geodiag.hooks.measure.experts import EXPERTS
from geodiag.hooks.measure.forward_hooks import ForwardHooks
from geodiag.hooks.measure.gains import GAINS
from geodiag.hooks.measure.metric_group import MetricGroup
from geodiag.hooks.measure.parameter_metrics import PARAMETERS
from geodiag.hooks.measure.routers import ROUTERS
from geodiag.hooks.measure.step_values import Values
from geodiag.hooks.measure.streams import STREAMS
from geodiag.hooks.probes.perturbation_growth import GROWTH
from geodiag.hooks.probes.probe_metrics import ON_PROBE_FORWARD
from geodiag.hooks.probes.weight_spectra import SPECTRA
from geodiag.hooks.record.probe_table_rows import domain_rows
from geodiag.metrics.cadence import Cadence
from geodiag.metrics.registry import MATRICES, METRICS, keys_of
from tests.hooks import small
from tests.hooks.adapters import tiny_v4

PROBE = (small.tokens(999)[:, :-1],)
DOMAINS = ("code", "prose", "code", "code")


def recorded(path: Path, steps: int = 7, **options: Any) -> geodiag.Run:
    t = small.trainer()
    with small.watch(t, path, **{"probe": PROBE, "probe_every": 2} | options) as monitor:
        small.train(t, steps, monitor)
    return geodiag.open_run(path)


GROUPS = (GAINS, STREAMS, ROUTERS, EXPERTS, PARAMETERS, *ON_PROBE_FORWARD, GROWTH, SPECTRA)


def test_every_metric_that_claims_a_group_has_one_measuring_function_there() -> None:
    assert {g.name for g in GROUPS} == {m.group for m in METRICS.values()} - {None}
    for group in GROUPS:
        assert group.measured | ({MATRICES} if group is GAINS else set()) == keys_of(group.name)


def test_every_metric_with_a_cadence_is_measured_or_reported_by_the_trainer() -> None:
    measured = frozenset().union(*(g.measured for g in GROUPS))
    assert measured | {MATRICES, "domains.loss", "domains.tokens"} == set(Cadence.of().every)


def test_a_measuring_function_must_name_a_metric_of_its_group_that_has_no_other() -> None:
    group = MetricGroup("routers")
    with pytest.raises(KeyError, match=r"no metric is registered as 'layers\.max_voi'"):
        group.per_step("layers.max_voi")(lambda seen: None)
    with pytest.raises(ValueError, match="declared in group gains, not routers"):
        group.per_token("layers.amax_gain_fwd")(lambda seen: None)
    group.per_step("layers.max_vio")(lambda seen: None)
    with pytest.raises(ValueError, match="two measuring functions"):
        group.per_step("layers.max_vio")(lambda seen: None)


@pytest.mark.parametrize("key", ["layers.max_voi", "router/max_vio", "max_vio"])
def test_a_value_under_an_unknown_name_is_reported_once_as_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    original = ForwardHooks.summarise

    def misspelt(hooks: ForwardHooks) -> Values:
        values = original(hooks)
        values[key] = values.pop("layers.max_vio")
        return values

    monkeypatch.setattr(ForwardHooks, "summarise", misspelt)
    run = recorded(tmp_path / "run", steps=3)
    problems = run.read("events").query("kind == 'problem'")
    assert len(problems) == 1
    assert key in problems["message"].iloc[0]
    assert capsys.readouterr().err.count(key) == 1
    layers = run.read("layers")
    assert layers["max_vio"].isna().all()
    assert layers["load_cv"].notna().any(), "the other values are recorded"


# -- cadence and layers --------------------------------------------------------------------------


def test_each_metric_is_recorded_at_its_own_cadence(tmp_path: Path) -> None:
    every = {
        "": 3,
        "amax_gain_fwd": 1,
        "experts": 2,
        "flip_rate": 4,
        "matrices": 6,
        "layers.grad_norm": 5,
    }
    run = recorded(tmp_path / "run", every=every, probe_every=10)
    layers = run.read("layers")
    when = {
        n: sorted(layers["step"][layers[n].notna()].unique())
        for n in layers.columns
        if layers[n].notna().any()
    }
    assert when["amax_gain_fwd"] == when["amax_gain_fwd_max"] == list(range(7))
    assert when["amax_gain_bwd"] == when["stream_rms"] == when["max_vio"] == [0, 3, 6]
    assert when["grad_norm"] == [0, 5]
    assert when["flip_rate"] == [4], "of the first probe there is nothing to compare with"
    assert when["curvature"] == [0]
    assert sorted(run.read("experts")["step"].unique()) == [0, 2, 4, 6]
    assert sorted(run.read("matrices")["step"].unique()) == [0, 6]
    assert run.read("steps")[["loss", "tokens", "grad_norm"]].notna().all().all(), (
        "a step's own row is never sparse"
    )
    said = json.loads((tmp_path / "run/run.json").read_text())
    cadence = Cadence.of_run(said)
    assert (cadence.every["layers.amax_gain_fwd"], cadence.every["layers.stream_rms"]) == (1, 3)


def test_routers_alone_are_measured_as_among_everything(tmp_path: Path) -> None:
    rare = dict.fromkeys(("layers", "experts", "matrices"), 100)
    every, some = (
        recorded(tmp_path / "a"),
        recorded(tmp_path / "b", every=rare | {"router_margin": 2, "max_vio": 2}),
    )
    names = ["router_margin_mean", "router_margin_p10", "max_vio"]
    a, b = (run.read("layers", ["step", "layer", "site", *names]) for run in (every, some))
    a, b = (
        rows[(rows["step"] == 4) & (rows["site"] == "ffn")][names].to_numpy() for rows in (a, b)
    )
    assert np.array_equal(a, b, equal_nan=True)
    assert np.isfinite(b[1:]).all(), "the first layer's router is a hash"


def test_sparse_values_are_those_of_a_dense_recording(tmp_path: Path) -> None:
    dense, sparse = (
        recorded(tmp_path / "a"),
        recorded(tmp_path / "b", every={"": 3, "composite": 2, "act_": 1}),
    )
    a, b = (r.read("layers").set_index(["step", "layer", "site"]) for r in (dense, sparse))
    compared = 0
    for name in b.columns.drop("rank"):
        values = b[name].dropna()
        np.testing.assert_allclose(values, a.loc[values.index, name], rtol=1e-6, err_msg=name)
        compared += len(values)
    assert compared > 300


def test_layers_that_are_left_out_have_no_rows_and_change_no_values(tmp_path: Path) -> None:
    every, some = recorded(tmp_path / "a"), recorded(tmp_path / "b", layers="1-")
    for table in ("layers", "experts", "matrices", "tokens"):
        a, b = every.read(table), some.read(table)
        assert sorted(b["layer"].unique()) == [1, 2]
        a = a[a["layer"] > 0].reset_index(drop=True)
        names = [
            n
            for n in a.select_dtypes("number").columns
            if n not in ("token", "token_id", "norm", "margin")
        ]
        if table != "tokens":  # which tokens flipped most, other layers decide too
            for name in names:
                np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=f"{table} {name}")
    assert some.read("layers")["composite_gain_fwd"].notna().all(), (
        "a product over all sites, watched or not"
    )
    assert some.manifest["config"]["cadence"]["layers"] == [1, 2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": {"amax_gian": 1}}, "did you mean amax_gain"),
        ({"layers": "0-9"}, "the model has no layer 3; pass some of 0 to 2"),
        ({"every": {"loss": 2, "record": 3}}, "table steps"),
    ],
)
def test_what_cannot_be_recorded_is_one_line_before_the_run_begins(
    tmp_path: Path, options: dict, said: str
) -> None:
    with pytest.raises(GeodiagError, match=said):
        small.watch(small.trainer(), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_losses_are_bitwise_those_without_geodiag_whatever_is_measured(tmp_path: Path) -> None:
    bare = small.train(small.trainer(), 7)
    t = small.trainer()
    options = {
        "every": {"": 2, "curvature": 1, "perturbation": 1},
        "probe_every": 1,
        "layers": "0,2",
        "trace": [1, 5],
    }
    with small.watch(t, tmp_path / "run", probe=PROBE, probe_domains=DOMAINS, **options) as monitor:
        assert small.train(t, 7, monitor) == bare
    assert (geodiag.open_run(tmp_path / "run").read("events")["kind"] == "problem").sum() == 0


def test_probe_time_is_on_record_where_there_was_a_probe(tmp_path: Path) -> None:
    steps = recorded(tmp_path / "run", probe_every=3).read("steps")
    assert steps["probe_seconds"].notna().tolist() == [True, False, False, True, False, False, True]
    assert (steps["probe_seconds"].dropna() > 0).all()
    later = steps["record_seconds"].shift(-1)
    assert (steps["probe_seconds"] < later).dropna()[[0, 3]].all(), (
        "the probes' time is part of what geodiag took"
    )


# -- tokens and domains --------------------------------------------------------------------------


def test_traced_tokens_are_rows_of_the_probe_batch(tmp_path: Path) -> None:
    rows = recorded(tmp_path / "run", trace=[30, 2]).read("tokens")
    assert rows["token"].unique().tolist() == [2, 30]
    ids = PROBE[0].flatten()
    assert (rows["token_id"] == rows["token"].map(lambda t: ids[t].item())).all()
    first = rows[rows["step"] == 0]
    assert first[["layer", "site"]].drop_duplicates().to_numpy().tolist() == [
        [layer, site] for layer in range(3) for site in ("attn", "ffn")
    ]
    assert rows["norm"].gt(0).all()
    chosen = rows[rows["site"] == "ffn"]
    assert chosen["experts"].map(len).eq(2).all()
    assert rows[rows["site"] == "attn"][["margin", "flipped"]].isna().all().all()
    assert chosen[chosen["layer"] == 0]["margin"].isna().all(), "a hash has no margin"
    assert chosen[chosen["layer"] > 0]["margin"].gt(0).all()
    assert first["flipped"].isna().all()
    assert chosen[chosen["step"] > 0]["flipped"].notna().all()


def test_a_flip_of_a_traced_token_is_a_change_of_its_experts(tmp_path: Path) -> None:
    rows = recorded(tmp_path / "run", steps=9, trace=list(range(48))).read("tokens")
    rows = rows[rows["site"] == "ffn"].set_index(["step", "layer", "token"]).sort_index()
    changed = 0
    for (step, layer, token), row in rows.loc[2:].iterrows():
        before = set(rows.loc[(step - 2, layer, token), "experts"])
        share = 1 - len(before & set(row["experts"])) / 2
        assert row["flipped"] == pytest.approx(share)
        changed += share > 0
    assert changed > 10


def test_a_token_outside_the_probe_is_said_once_with_the_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recorded(tmp_path / "run", trace=[48])
    assert (
        capsys.readouterr().err.count("the probe batch has 48 tokens and no token 48; pass 0 to 47")
        == 1
    )


def test_domains_are_means_over_their_own_sequences(tmp_path: Path) -> None:
    t = small.trainer()
    losses = torch.tensor([1.0, 2.0, 3.0, 7.0])
    names = ("code", "prose", "prose", "logs")
    with small.watch(
        t, tmp_path / "run", probe=PROBE, probe_domains=DOMAINS, probe_every=2
    ) as monitor:
        for step in range(4):
            small.train(t, 1, None, start=step)
            monitor.step(2.0, domains=names, sequence_losses=losses)
    rows = geodiag.open_run(tmp_path / "run").read("domains").set_index(["step", "domain"])
    assert rows["loss"].loc[1].to_dict() == {"code": 1.0, "logs": 7.0, "prose": 2.5}
    assert rows["tokens"].loc[1].to_dict() == {"code": 12.0, "logs": 12.0, "prose": 24.0}
    assert rows["flip_rate"].loc[2].notna().to_dict() == {
        "code": True,
        "logs": False,
        "prose": True,
    }
    assert rows["flip_rate"].loc[3].isna().all()


def test_flips_and_clamp_hits_by_domain_add_up_to_the_whole_probes(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", steps=5, probe_domains=DOMAINS)
    layers, domains = run.read("layers"), run.read("domains").set_index(["step", "domain"])
    whole = (
        layers[(layers["site"] == "ffn") & (layers["layer"] > 0)]
        .groupby("step")["flip_rate"]
        .mean()
    )
    for step in (2, 4):
        by = domains["flip_rate"].loc[step]
        assert 0.75 * by["code"] + 0.25 * by["prose"] == pytest.approx(whole[step], rel=1e-5)
        assert by["code"] != pytest.approx(whole[step], rel=1e-4), (
            "the twin: one domain is not the whole"
        )


@pytest.mark.parametrize("names", [("code",), ("code",) * 5])
def test_domains_that_are_not_one_a_sequence_are_said_with_the_fix(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="name one a sequence"):
        domain_rows({"domains.loss": np.ones(4)}, names, None)


def test_domains_without_a_probe_of_theirs_have_no_probe_columns(tmp_path: Path) -> None:
    t = small.trainer()
    with small.watch(t, tmp_path / "run", probe=PROBE) as monitor:
        small.train(t, 1, None)
        monitor.step(2.0, domains=("a",) * 4, sequence_losses=torch.ones(4))
    rows = geodiag.open_run(tmp_path / "run").read("domains")
    assert rows["loss"].tolist() == [1.0]
    assert rows[["flip_rate", "clamp_gate_rate"]].isna().all().all()


# -- data shift ----------------------------------------------------------------------------------


def expected_shifts(means: list[Tensor]) -> list[float | None]:
    """1 − cosine to the running mean of the batches before, in float64."""
    running, out = means[0].double(), [None]
    for mean in means[1:]:
        m = mean.double()
        out.append(1 - (m @ running / m.norm() / running.norm()).item())  # type: ignore[arg-type]
        running = running + (m - running) / REMEMBERED
    return out


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_data_shift_is_one_minus_the_cosine_to_the_running_mean(
    tmp_path: Path, micro_batches: int
) -> None:
    t, means = small.trainer(micro_batches=micro_batches), []
    with small.watch(t, tmp_path / "run", every=3) as monitor:
        for step in range(6):
            ids = small.tokens(step) if step != 4 else torch.full_like(small.tokens(0), 3)
            means.append(t.model.embed(ids[:, :-1]).detach().flatten(0, 1).mean(0))
            small.one_step(t, ids, monitor)
    got = geodiag.open_run(tmp_path / "run").read("steps")["data_shift"]
    expected = expected_shifts(means)
    assert np.isnan(got[0])
    np.testing.assert_allclose(got[1:], expected[1:], rtol=1e-3, atol=1e-6)
    assert got[4] > 2 * max(got[1:4]), "one repeated token is another kind of data"
    twin = expected_shifts([means[0], *means[:-1]])
    assert abs(twin[4] - expected[4]) > 0.05, "the twin: the batch of the step before"  # type: ignore[operator]


def test_data_shift_is_recorded_of_a_transformers_model_and_of_unknown_ones(tmp_path: Path) -> None:
    made = tiny_v4.model()
    optimizer = tiny_v4.optimizer(made)
    with geodiag.attach(made, optimizer, tmp_path / "v4", quiet=True) as monitor:
        for step in range(3):
            tiny_v4.one_step(made, optimizer, tiny_v4.batch(step), monitor)
    blocks = small.Blocks()
    sgd = torch.optim.SGD(blocks.parameters(), lr=0.1)
    with geodiag.attach(blocks, sgd, tmp_path / "blocks", quiet=True) as monitor:
        for step in range(3):
            loss = blocks(small.tokens(step)).square().mean()
            loss.backward()
            sgd.step()
            monitor.step(loss)
    for name in ("v4", "blocks"):
        run = geodiag.open_run(tmp_path / name)
        assert run.read("steps")["data_shift"].notna().tolist() == [False, True, True]
        assert run.read("layers")["perturbation_growth"].notna().any()
        assert run.read("tokens")["norm"].gt(0).all()
        assert (run.read("events")["kind"] == "problem").sum() == 0
