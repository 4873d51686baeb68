"""Attention against one written position by position in float64 from its definition."""

import math

import pytest
import torch
from torch import Tensor

from geodiag.reference_models.attention import Attention, rotary_table, rotate
from tests.hooks.small import config
from tests.reference_models.close import error

TOLERANCE = 1e-5
B, S, H, D = 2, 7, 2, 8


@pytest.fixture
def attention() -> Attention:
    torch.manual_seed(0)
    made = Attention(config(sequence=S, channels=16, heads=H, head_dim=D))
    for p in made.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.3)
    return made


def rms(v: Tensor, gain: Tensor) -> Tensor:
    return v / math.sqrt(sum(float(e) ** 2 for e in v) / len(v) + 1e-6) * gain


def turned(v: Tensor, position: int, theta: float = 10_000.0) -> Tensor:
    """RoPE as complex numbers: pair (i, i + D/2) is one number, turned by position · θ^(−2i/D)."""
    half = len(v) // 2
    out = v.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(v))
        z = complex(v[i], v[i + half]) * complex(math.cos(angle), math.sin(angle))
        out[i], out[i + half] = z.real, z.imag
    return out


def slow(
    a: Attention, x_BSC: Tensor, *, rotary: bool = True, norm: bool = True, causal: bool = True
) -> Tensor:
    """softmax(q·k / √D) over what came before, one query at a time."""
    x = x_BSC.detach().double()
    w, out = a.qkv.weight.detach().double(), a.out.weight.detach().double()
    gain_q, gain_k = a.q_norm.weight.detach().double(), a.k_norm.weight.detach().double()
    y = torch.zeros(*x.shape[:2], H * D, dtype=torch.float64)
    for b in range(x.shape[0]):
        for h in range(H):
            q, k, v = (
                [w[(j * H + h) * D : (j * H + h + 1) * D] @ x[b, s] for s in range(S)]
                for j in range(3)
            )
            if norm:
                q, k = [rms(e, gain_q) for e in q], [rms(e, gain_k) for e in k]
            if rotary:
                q, k = ([turned(e, s) for s, e in enumerate(part)] for part in (q, k))
            for s in range(S):
                seen = range(s + 1 if causal else S)
                weight = torch.softmax(torch.stack([q[s] @ k[t] for t in seen]) / math.sqrt(D), 0)
                y[b, s, h * D : (h + 1) * D] = sum(weight[t] * v[t] for t in seen)
    return y @ out.T


def run(a: Attention, x: Tensor) -> Tensor:
    return a(x, rotary_table(S, D, 10_000.0))


def test_attention_is_its_definition(attention: Attention) -> None:
    x = torch.randn(B, S, 16)
    assert error(run(attention, x), slow(attention, x)) < TOLERANCE


@pytest.mark.parametrize("left_out", ["rotary", "norm", "causal"])
def test_attention_without_one_of_its_parts_would_be_seen(
    attention: Attention, left_out: str
) -> None:
    x = torch.randn(B, S, 16)
    assert error(run(attention, x), slow(attention, x, **{left_out: False})) > 100 * TOLERANCE


@pytest.mark.parametrize("position", range(S))
def test_no_position_sees_the_future(attention: Attention, position: int) -> None:
    x = torch.randn(B, S, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(run(attention, x)[:, position].sum(), x)
    assert not grad[:, position + 1 :].any()
    assert (grad[:, : position + 1].abs().amax((0, 2)) > 0).all(), "and each sees all of the past"


def test_scores_depend_on_how_far_apart_two_positions_are_alone() -> None:
    table = rotary_table(64, D, 10_000.0).double()
    q, k = torch.randn(D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    line = torch.stack([q, k]).expand(64, 2, D).unsqueeze(0)
    q_S, k_S = rotate(line, table)[0].unbind(1)
    scores = q_S @ k_S.T
    for apart in (0, 1, 7):
        along = scores.diagonal(-apart)
        assert (along - along[0]).abs().max() < 1e-6
    assert (scores[0, 0] - scores[1, 0]).abs() > 1e-3, "but it does depend on that"


def test_angles_of_far_positions_stay_apart_in_bfloat16() -> None:
    table = rotary_table(4096, 128, 10_000.0)
    x = torch.ones(1, 4096, 1, 128, dtype=torch.bfloat16)
    half = rotate(x, table)
    assert half.dtype == torch.bfloat16
    assert error(half, rotate(x.double(), table)) < 3e-3
    rounded = rotate(x, table.bfloat16())
    assert error(rounded, rotate(x.double(), table)) > error(half, rotate(x.double(), table))
