"""The training step: which optimizer moves what, the schedule, clipping, micro-batches, resume,
recomputation.
"""

import copy
import io
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from geodiag.reference_models.config import sized
from geodiag.reference_models.data import Batch, Loader
from geodiag.reference_models.moe import HashRouter
from geodiag.reference_models.text import Corpus, stdlib
from geodiag.reference_models.train import TrainConfig, Trainer
from geodiag.reference_models.transformer import Transformer
from tests.hooks.small import SEQUENCES, config, tokens, train, trainer
from tests.reference_models.close import error


def batch(step: int) -> Batch:
    ids = tokens(step)
    return Batch(step, ids[:, :-1], ids[:, 1:], ("x",) * SEQUENCES)


def state_of(t: Trainer) -> Iterator[Tensor]:
    """Every tensor that a training carries from step to step."""
    yield from t.model.state_dict().values()
    for optimizer in t.optimizers:
        for state in optimizer.state.values():
            yield from (v for v in state.values() if isinstance(v, Tensor))


# -- optimizers ----------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["plain", "hc", "mhc"])
def test_muon_moves_the_blocks_matrices_and_adamw_everything_else(residual: str) -> None:
    t = trainer(residual)
    names = {id(p): n for n, p in t.model.named_parameters()}
    flat, stacked, rest = (
        {names[id(p)] for g in o.param_groups for p in g["params"]} for o in t.optimizers
    )
    layer = [n.removeprefix("layers.1.") for n in names.values() if n.startswith("layers.1.")]
    assert {n for n in layer if f"layers.1.{n}" in flat} == {
        "attn.qkv.weight",
        "attn.out.weight",
        "moe.shared.gate_up.weight",
        "moe.shared.down.weight",
    }
    assert {n for n in layer if f"layers.1.{n}" in stacked} == {
        "moe.experts.gate_up",
        "moe.experts.down",
    }
    assert {"embed.weight", "head.weight", "norm.weight", "layers.1.moe.router.weight"} <= rest
    if residual != "plain":
        assert {"layers.1.attn_hc.phi", "layers.1.ffn_hc.bias"} <= rest
    assert flat | stacked | rest == set(names.values()), "every parameter in one optimizer"
    assert len(flat) + len(stacked) + len(rest) == len(names), "and in no other"


def test_every_parameter_moves_in_a_step() -> None:
    t = trainer()
    before = copy.deepcopy(t.model.state_dict())
    t.step(batch(0))
    still = [n for n, p in t.model.named_parameters() if torch.equal(p, before[n])]
    assert still == []


# -- schedule and clipping -----------------------------------------------------------------


def test_the_learning_rate_warms_up_evenly_peaks_and_falls_as_a_cosine() -> None:
    c = TrainConfig(steps=300, warmup=20, lr=1.0, decay_to=0.1)
    rates = [c.lr_at(s) for s in range(300)]
    assert rates[:20] == pytest.approx([(s + 1) / 20 for s in range(20)])
    assert max(rates) == rates[19] == rates[20] == 1.0
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert c.lr_at(160) == pytest.approx(0.55), "half-way down at half time"
    assert rates[-1] == pytest.approx(0.1, rel=1e-3)
    assert c.lr_at(300) == c.lr_at(1000) == pytest.approx(0.1), "flat from there on"


def test_the_schedule_has_one_kink_and_no_jump() -> None:
    c = TrainConfig(steps=300, warmup=20, lr=1.0)
    rates = torch.tensor([c.lr_at(s) for s in range(320)], dtype=torch.float64)
    assert rates.diff().abs().max() <= 0.05 + 1e-12, "no step is larger than warm-up's"
    bends = rates.diff().diff().abs()
    assert [i + 1 for i in (bends > 1e-3).nonzero().flatten().tolist()] == [19], (
        "where warm-up ends"
    )


@pytest.mark.parametrize(("steps", "warmup"), [(1, 20), (20, 20), (5, 0), (21, 20)])
def test_short_trainings_and_no_warm_up_have_rates_too(steps: int, warmup: int) -> None:
    rates = [TrainConfig(steps=steps, warmup=warmup, lr=1.0).lr_at(s) for s in range(steps + 1)]
    assert all(0 < r <= 1 for r in rates)


def test_the_optimizers_are_given_the_schedules_rate() -> None:
    t = trainer()
    for step in range(7):
        done = t.step(batch(step))
        assert done.lr == t.config.lr_at(step)
        assert {g["lr"] for o in t.optimizers for g in o.param_groups} == {done.lr}
    t.lr_scale = 10.0
    assert t.step(batch(7)).lr == pytest.approx(10 * t.config.lr_at(7))


def test_gradients_are_clipped_to_the_limit_and_the_reported_norm_is_the_unclipped_one() -> None:
    def seen(clip: float) -> tuple[float, float]:
        torch.manual_seed(0)
        t = Trainer(Transformer(config()), TrainConfig(steps=9, sequences=SEQUENCES, clip=clip))
        found: list[float] = []
        t.optimizers[0].register_step_pre_hook(
            lambda *_: found.append(
                torch.nn.utils.get_total_norm([p.grad for p in t.model.parameters()]).item()
            )
        )
        return t.step(batch(0)).grad_norm.item(), found[0]

    reported, applied = seen(math.inf)
    assert applied == pytest.approx(reported, rel=1e-6)
    for clip in (reported / 3, reported * 3):
        again, applied = seen(clip)
        assert again == pytest.approx(reported, rel=1e-6)
        assert applied == pytest.approx(min(clip, reported), rel=1e-4)


# -- micro-batches -------------------------------------------------------------------------


def gradients(micro_batches: int) -> tuple[list[Tensor], float, int]:
    t = trainer(micro_batches=micro_batches)
    for part in batch(0).split(micro_batches):
        t.accumulate(part)
    grads = [p.grad.clone() for p in t.model.parameters() if p.grad is not None]
    done = t.update()
    return grads, done.loss.item(), done.tokens


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_give_the_whole_batchs_gradients_loss_and_tokens(micro_batches: int) -> None:
    (whole, loss, count), (parts, loss_of_parts, count_of_parts) = (
        gradients(1),
        gradients(micro_batches),
    )
    assert max(map(error, parts, whole)) < 1e-4
    assert loss_of_parts == pytest.approx(loss, rel=1e-6)
    assert count_of_parts == count
    halves = [g / 2 for g in whole]
    assert min(map(error, halves, whole)) > 0.1, "a missing division would be seen"


def test_the_balancing_bias_goes_by_the_loads_of_all_micro_batches() -> None:
    biases = []
    for micro_batches in (1, 4):
        t = trainer(micro_batches=micro_batches)
        t.step(batch(0))
        assert isinstance(t.model.blocks[0].moe.router, HashRouter)
        assert not t.model.blocks[0].moe.router.balance.any(), (
            "hashed layers have nothing to balance"
        )
        biases.append([b.moe.router.balance for b in t.model.blocks[1:]])
    assert all(map(torch.equal, *biases))
    assert all(b.any() for b in biases[0])


def test_an_update_before_all_micro_batches_is_refused() -> None:
    t = trainer(micro_batches=2)
    t.accumulate(batch(0).split(2)[0])
    with pytest.raises(ValueError, match="1 of 2 micro-batches"):
        t.update()
    with pytest.raises(ValueError, match="4 sequences do not make 3 equal micro-batches"):
        batch(0).split(3)


# -- resume --------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["plain", "hc", "mhc"])
def test_a_training_resumed_from_its_saved_state_goes_on_bit_for_bit(residual: str) -> None:
    whole = trainer(residual)
    losses = train(whole, 9)
    first = trainer(residual)
    train(first, 4)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = trainer(residual, seed=99)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert train(second, 5, start=4) == losses[4:]
    assert all(map(torch.equal, state_of(second), state_of(whole)))


@pytest.mark.parametrize("lost", ["optimizers", "progress", "model"])
def test_a_resume_that_forgets_something_would_be_seen(lost: str) -> None:
    losses = train(trainer(), 9)
    first = trainer()
    train(first, 4)
    second = trainer(seed=99)
    second.load_state_dict(copy.deepcopy(first.state_dict()) | {lost: second.state_dict()[lost]})
    assert train(second, 5, start=4) != losses[4:]


# -- recomputation -------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_training_uses_deterministic_backwards_only(
    wanted: bool,
) -> None:
    def mode() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.cudnn_sdp_enabled()

    before, seen = mode(), {}
    t = Trainer(Transformer(config()), TrainConfig(sequences=SEQUENCES, deterministic=wanted))
    t.model.head.register_forward_hook(lambda *_: seen.update(forward=mode()))
    t.model.head.weight.register_hook(lambda _: seen.update(backward=mode()))
    train(t, 1)
    assert seen == {"forward": (False, not wanted), "backward": (wanted, not wanted)}
    assert mode() == before == (False, True)


def test_recomputation_gives_the_same_losses_gradients_and_weights() -> None:
    results = []
    for recompute in ("none", "layers"):
        t = trainer(recompute=recompute)
        losses = train(t, 3)
        t.accumulate(batch(3))
        results.append((losses, [p.grad for p in t.model.parameters()], list(state_of(t))))
    assert results[0][0] == results[1][0]
    for kept, again in zip(
        results[0][1] + results[0][2], results[1][1] + results[1][2], strict=True
    ):
        assert kept is not None
        assert again is not None
        assert torch.equal(kept, again)


def test_recomputation_runs_every_layer_a_second_time() -> None:
    counts = []
    for recompute in ("none", "layers"):
        t, runs = trainer(recompute=recompute), []
        t.model.blocks[1].attn.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        t.accumulate(batch(0))
        counts.append(len(runs))
    assert counts == [1, 2]


# -- learning ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text() -> Corpus:
    return stdlib()


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["plain", "hc", "mhc"])
def test_tiny_learns_real_text_within_sixty_steps(residual: str, text: Corpus) -> None:
    torch.manual_seed(0)
    shape = sized("tiny", residual, sequence=48)  # type: ignore[arg-type]
    t = Trainer(Transformer(shape), TrainConfig(steps=60, sequences=8, warmup=10))
    loader = Loader(text, 8, 48)
    losses = [t.step(loader.batch(step)).loss.item() for step in range(60)]
    assert losses[0] == pytest.approx(math.log(256), abs=0.2)
    assert sum(losses[-5:]) / 5 < losses[0] - 2
