"""The clamped activation's kernels: values, gradients, and counts that are exact."""

import pytest
import torch

from geodiag.reference_models.kernels import reference
from geodiag.reference_models.kernels.autograd.swiglu import Activation, clamped_swiglu, counted_glu

GPT_OSS = Activation(7.0, 7.0, 1.702, 1.0, interleaved=True)
STEP = Activation(5.0, 8.0, clamp_after=True)
FREE = Activation(None, None)


def ends(expert, experts):
    """The row behind each expert's last."""
    return torch.searchsorted(expert, torch.arange(1, experts + 1, device=expert.device))


def hits(counted):
    """(E, 3): hits of the gate's limit, of the up limit from above, and from below."""
    names = ("clamp_gate_rate", "clamp_up_high_rate", "clamp_up_low_rate")
    return torch.stack([counted.by_name[name] for name in names], -1)


def extrema(counted):
    """(E, 3): largest |gate|, |up| and |product|."""
    names = ("gate_amax", "up_amax", "act_amax")
    return torch.stack([counted.by_name[name] for name in names], -1)


def definition(x, a: Activation):
    """METRICS' clamped GLU in plain torch: the product, and the masks of its three clamps."""
    gate, up = (x[..., ::2], x[..., 1::2]) if a.interleaved else x.chunk(2, -1)
    none = torch.zeros_like(gate, dtype=torch.bool)
    held, hit = gate, none
    if a.gate_limit is not None and not a.clamp_after:
        held, hit = gate.clamp(max=a.gate_limit), gate > a.gate_limit
    act = held * torch.sigmoid(a.alpha * held)
    if a.gate_limit is not None and a.clamp_after:
        act, hit = act.clamp(max=a.gate_limit), act > a.gate_limit
    high, low = none, none
    if a.up_limit is not None:
        high, low, up = up > a.up_limit, up < -a.up_limit, up.clamp(-a.up_limit, a.up_limit)
    return act * (up + a.up_offset), (hit, high, low)


@pytest.mark.parametrize("limit", [10.0, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_value_and_gradient_are_the_reference_s(device, error, tolerance, dtype, limit):
    x = (6 * torch.randn(19, 2 * 40, device=device)).to(dtype).requires_grad_()
    up = torch.randn(19, 40, device=device).to(dtype)
    wide = x.detach().double().requires_grad_()
    out, want = clamped_swiglu(x, limit), reference.clamped_swiglu(wide, limit)
    assert error(out, want) < tolerance[dtype]
    (grad,), (truth,) = (
        torch.autograd.grad(out, x, up),
        torch.autograd.grad(want, wide, up.double()),
    )
    assert error(grad, truth) < tolerance[dtype]
    assert error(torch.zeros_like(grad), truth) > 10 * tolerance[dtype]
    if limit is not None:
        unclamped = torch.autograd.grad(reference.clamped_swiglu(wide, None), wide, up.double())[0]
        assert limit == 10.0 or error(unclamped, truth) > 10 * tolerance[dtype]


@pytest.mark.parametrize("activation", [Activation(), GPT_OSS, STEP, FREE])
def test_every_model_s_variant_with_exact_counts(device, error, activation):
    x = (6 * torch.randn(70, 2 * 24, device=device)).requires_grad_()
    expert = torch.randint(0, 4, (70,), device=device).sort().values
    counted = counted_glu(x, ends(expert, 6), activation)
    wide = x.detach().double().requires_grad_()
    want, masks = definition(wide, activation)
    up = torch.randn(70, 24, device=device)
    assert error(counted.out_AF, want) < 5e-6
    grads = (
        torch.autograd.grad(counted.out_AF, x, up)[0],
        torch.autograd.grad(want, wide, up.double())[0],
    )
    assert error(*grads) < 5e-6
    gate, linear = (
        (wide[..., ::2], wide[..., 1::2]) if activation.interleaved else wide.chunk(2, -1)
    )
    for e in range(6):
        rows = expert == e
        assert hits(counted)[e].tolist() == [int(m[rows].sum()) for m in masks]
        for i, values in enumerate((gate, linear, want)):
            largest = float(values[rows].abs().max()) if rows.any() else 0.0
            assert float(extrema(counted)[e, i]) == pytest.approx(largest, rel=1e-5)
        assert int(counted.by_name["elements"][e]) == int(rows.sum()) * 24
        assert float(counted.by_name["square"][e]) == pytest.approx(
            float(want[rows].square().sum()), rel=1e-4
        )
    assert (hits(counted).sum() > 0) == (activation is not FREE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_of_two_bytes_are_counted_exactly_infinite_ones_too(device, dtype):
    x = (6 * torch.randn(70, 2 * 24, device=device)).to(dtype)
    x[3, 0], x[5, 30], x[60, 1] = float("inf"), -float("inf"), float("nan")
    expert = torch.arange(70, device=device) * 4 // 70
    counted = counted_glu(x, ends(expert, 4))
    gate, up = x.float().chunk(2, -1)
    for e in range(4):
        rows = expert == e
        want = [int(m[rows].sum()) for m in (gate > 10, up > 10, up < -10)]
        assert hits(counted)[e].tolist() == want
        most = gate[rows].abs().max()
        torch.testing.assert_close(extrema(counted)[e, 0], most, rtol=0, atol=0, equal_nan=True)
    assert extrema(counted)[3, 0].isnan()
    assert extrema(counted)[0, :2].isinf().all()


def test_exactly_at_the_limit_is_no_hit_and_has_a_gradient(device):
    x = torch.tensor([[10.0, 10.0]], device=device, requires_grad=True)
    counted = counted_glu(x, torch.ones(1, dtype=torch.long, device=device))
    assert hits(counted).tolist() == [[0, 0, 0]]
    assert torch.autograd.grad(counted.out_AF.sum(), x)[0].abs().min() > 0


def test_nan_passes_through_the_clamp_and_into_the_extrema(device):
    x = torch.randn(6, 2 * 8, device=device)
    x[2, 3] = float("nan")
    counted = counted_glu(x, ends(torch.arange(6, device=device) // 3, 2))
    assert counted.out_AF[2, 3].isnan()
    assert counted.out_AF.isnan().sum() == 1
    assert extrema(counted)[0].isnan().tolist() == [True, False, True]
    assert extrema(counted)[1].isfinite().all()


def test_zero_rows_are_accepted(device):
    assert clamped_swiglu(torch.randn(0, 16, device=device)).shape == (0, 8)
    with pytest.raises(ValueError, match="even width"):
        clamped_swiglu(torch.randn(2, 15, device=device))


def test_experts_of_every_length_are_counted_apart(device):
    """Long enough to fill blocks, short enough to share one, empty at the start, inside and at the
    end.
    """
    lengths = torch.tensor([0, 3, 1, 0, 0, 200, 40, 2, 1, 1, 1, 65, 0], device=device)
    expert = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    x = 6 * torch.randn(len(expert), 2 * 24, device=device)
    counted = counted_glu(x, lengths.cumsum(0))
    want, masks = definition(x.double(), Activation())
    for e in range(len(lengths)):
        assert hits(counted)[e].tolist() == [int(m[expert == e].sum()) for m in masks]
        assert float(counted.by_name["square"][e]) == pytest.approx(
            float(want[expert == e].square().sum()), rel=1e-4
        )
    assert counted.by_name["elements"].tolist() == (24 * lengths).tolist()
    assert extrema(counted)[0].tolist() == [0, 0, 0]


def test_switched_off_counts_nothing_and_changes_no_result(device):
    x, where = 6 * torch.randn(20, 2 * 24, device=device), torch.tensor([7, 20], device=device)
    off = counted_glu(x, where, flag=torch.zeros((), dtype=torch.int32, device=device))
    assert off.counts_E8.isnan().all()
    assert torch.equal(off.out_AF, counted_glu(x, where).out_AF)
    assert torch.equal(off.out_AF, clamped_swiglu(x))
