"""The router's kernel: the same choice, weights and gradients as the reference, and its
diagnostics.
"""

import pytest
import torch
import torch.nn.functional as F

from geodiag.reference_models.kernels import reference
from geodiag.reference_models.kernels.autograd.router import route


def truth(logits, bias, k, scale):
    scores = F.softplus(logits).sqrt()
    ids = reference.choose(scores, bias.to(scores), k)
    return scores, ids, reference.weigh(scores, ids, scale)


@pytest.mark.parametrize(("experts", "k", "tokens"), [(8, 2, 21), (10, 3, 5), (64, 6, 18)])
def test_choice_weights_and_gradients_are_the_reference_s(device, error, experts, k, tokens):
    logits = (3 * torch.randn(tokens, experts, device=device)).requires_grad_()
    bias = 0.3 * torch.randn(experts, device=device)
    routed = route(logits, bias, k, 1.5)
    wide = logits.detach().double().requires_grad_()
    scores, ids, weights = truth(wide, bias, k, 1.5)
    assert torch.equal(routed.expert_ids_TK, ids)
    assert error(routed.scores_TE, scores) < 1e-6
    assert error(routed.weights_TK, weights) < 1e-6
    ups = torch.randn_like(routed.scores_TE), torch.randn_like(routed.weights_TK)
    ours = torch.autograd.grad((routed.scores_TE, routed.weights_TK), logits, ups)[0]
    want = torch.autograd.grad((scores, weights), wide, [u.double() for u in ups])[0]
    assert error(ours, want) < 1e-5
    without_weights = torch.autograd.grad(truth(wide, bias, k, 1.5)[0], wide, ups[0].double())[0]
    assert error(without_weights, want) > 1e-3


def test_logits_of_any_size_have_the_reference_s_finite_gradient(device, error):
    """softplus of -110 is 0, and so is its root's argument: a router that grows sure of itself must
    not end in NaN.
    """
    logits = torch.tensor(
        [[-110.0, 1.0, 0.5, -3e4], [200.0, -90.0, 0.0, 3e4]], device=device, requires_grad=True
    )
    bias = torch.zeros(4, device=device)

    def scores_and_gradient(routed):
        ups = (
            torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2, device=device),
            torch.tensor([[3.0, 2.0, 1.0]] * 2, device=device),
        )
        return routed.scores_TE, torch.autograd.grad(
            (routed.scores_TE, routed.weights_TK), logits, ups
        )[0]

    ours, want = (
        scores_and_gradient(route(logits, bias, 3, 1.5)),
        scores_and_gradient(reference.route(logits, bias, 3, 1.5)),
    )
    for a, b in zip(ours, want, strict=True):
        assert a.isfinite().all()
        assert error(a, b) < 1e-6
    naive = F.softplus(logits).sqrt()
    assert torch.autograd.grad(naive.sum(), logits)[0].isnan().any(), (
        "the twin: a root that nobody holds"
    )


@pytest.mark.parametrize("ids_type", [torch.int64, torch.int16])
def test_a_given_choice_is_weighed_as_the_kernel_s_own_bit_for_bit(device, error, ids_type):
    """What routing by older choices rests on: the same ids are the same training."""
    logits = (3 * torch.randn(21, 10, device=device)).requires_grad_()
    bias = 0.3 * torch.randn(10, device=device)
    own = route(logits, bias, 3, 1.5)
    given = route(logits, bias, 3, 1.5, given_TK=own.expert_ids_TK.to(ids_type))
    ups = torch.randn_like(own.scores_TE), torch.randn_like(own.weights_TK)

    def gradient(routed):
        return torch.autograd.grad(
            (routed.scores_TE, routed.weights_TK), logits, ups, retain_graph=True
        )[0]

    for a, b in zip([*own, gradient(own)], [*given, gradient(given)], strict=True):
        assert torch.equal(a, b)
    others = torch.stack([torch.randperm(10, device=device)[:3] for _ in range(21)])
    routed = route(logits, bias, 3, 1.5, given_TK=others.to(ids_type))
    wide = logits.detach().double().requires_grad_()
    scores = F.softplus(wide).sqrt()
    weights = reference.weigh(scores, others, 1.5)
    want = torch.autograd.grad((scores, weights), wide, [u.double() for u in ups])[0]
    assert torch.equal(routed.expert_ids_TK, others)
    assert error(routed.weights_TK, weights) < 1e-6
    assert error(gradient(routed), want) < 1e-5
    assert error(gradient(own), want) > 1e-2, "the twin: another choice has other gradients"


def test_entropy_margin_load_and_flips_are_their_definitions(device, error):
    logits, bias = torch.randn(33, 12, device=device), 0.2 * torch.randn(12, device=device)
    before = torch.stack([torch.randperm(12, device=device)[:3] for _ in range(33)])
    routed = route(logits, bias, 3, 1.0, before)
    scores, ids, _ = truth(logits.double(), bias, 3, 1.0)
    share = scores / scores.sum(-1, keepdim=True)
    best = (scores + bias).topk(4).values
    assert error(routed.entropy_T, -(share * share.log()).sum(-1)) < 1e-6
    assert error(routed.margin_T, best[:, 2] - best[:, 3]) < 1e-4
    assert routed.load_E.tolist() == torch.bincount(ids.flatten(), minlength=12).tolist()
    stayed = (ids[:, :, None] == before[:, None, :]).any(-1).double().mean(-1)
    assert error(routed.flipped_T, 1 - stayed) < 1e-6
    assert route(logits, bias, 3, 1.0, ids.flip(-1)).flipped_T.abs().max() == 0


def test_nan_keeps_ids_valid_and_weights_nan_in_its_own_token(device):
    logits = torch.randn(5, 8, device=device)
    logits[2, 4] = float("nan")
    routed = route(logits, torch.zeros(8, device=device), 2, 1.0)
    assert routed.expert_ids_TK.min() >= 0
    assert routed.expert_ids_TK.max() < 8
    assert routed.weights_TK[2].isnan().all()
    assert routed.entropy_T[2].isnan()
    assert routed.weights_TK[[0, 1, 3, 4]].isfinite().all()


def test_choosing_all_experts_is_refused(device):
    with pytest.raises(ValueError, match="k is 1 to 3"):
        route(torch.randn(2, 4, device=device), torch.zeros(4, device=device), 4, 1.0)
