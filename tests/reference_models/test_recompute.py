"""What is computed again in the backward is what was computed: same gradients, same records, less
kept.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from geodiag.reference_models.config import sized
from geodiag.reference_models.recompute import Recomputed, block_length
from geodiag.reference_models.transformer import Transformer


def made(recompute: str, residual: str = "mhc", **changes: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        sized(
            "tiny",
            residual,
            recompute=recompute,
            channels=16,
            expert_dim=16,
            sequence=16,
            **changes,
        )  # type: ignore[arg-type]
    )


def gradients(model: Transformer, passes: int = 1) -> dict[str, Tensor]:
    ids = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(1))
    for _ in range(passes):
        model.loss(model(ids[:, :-1]), ids[:, 1:]).total.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("residual", ["mhc", "hc", "plain"])
@pytest.mark.parametrize("recompute", ["mhc", "layers"])
def test_recomputed_gradients_are_bitwise_those_without_recomputation(
    residual: str, recompute: str
) -> None:
    wanted, found = gradients(made("none", residual), 2), gradients(made(recompute, residual), 2)
    assert wanted.keys() == found.keys()
    for name, grad in found.items():
        assert torch.equal(grad, wanted[name]), name


def test_another_branch_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward really runs on what was computed again: were that another stream, the gradients
    would differ.
    """
    again = Recomputed._replay

    def disturbed(self: Recomputed) -> None:
        self._first = self._first * 1.5
        again(self)

    monkeypatch.setattr(Recomputed, "_replay", disturbed)
    wanted, found = gradients(made("none")), gradients(made("mhc"))
    assert any(not torch.allclose(found[n], wanted[n], rtol=1e-2) for n in wanted if "_hc.phi" in n)


def alive(model: Transformer) -> dict[str, int]:
    """Number of tensors of each kind that outlive the forward, kept for the backward."""
    seen: dict[str, list[StorageWeakRef]] = {"stream": [], "input": [], "branch": []}

    def watch(kind: str, tensor: Tensor) -> None:
        seen[kind].append(StorageWeakRef(tensor.untyped_storage()))

    for block in model.blocks:
        for connection, heavy in ((block.attn_hc, block.attn), (block.ffn_hc, block.moe)):
            connection.register_forward_hook(lambda _m, args, _o: watch("stream", args[0]))
            heavy.register_forward_hook(lambda _m, args, _o: watch("input", args[0]))
            heavy.register_forward_hook(
                lambda _m, _a, out: watch("branch", out[0] if isinstance(out, tuple) else out)
            )
    out = model(torch.randint(256, (2, 16)))
    found = {kind: sum(not ref.expired() for ref in refs) for kind, refs in seen.items()}
    del out
    return found


def test_a_block_keeps_one_stream_and_the_outputs_of_its_heavy_parts() -> None:
    assert alive(made("none")) == {"stream": 12, "input": 12, "branch": 12}
    assert alive(made("mhc")) == {"stream": 3, "input": 0, "branch": 12}


@pytest.mark.parametrize(
    ("streams", "layers", "length"), [(4, 12, 3), (4, 30, 4), (1, 12, 2), (4, 1, 1), (8, 60, 7)]
)
def test_the_block_length_follows_the_papers_formula(
    streams: int, layers: int, length: int
) -> None:
    assert block_length(streams, layers) == length
    cost = {k: streams * layers / k + (streams + 2) * k for k in range(1, layers + 1)}
    assert cost[length] <= 1.1 * min(cost.values()), (
        "the square root is where kept and made anew are in balance"
    )


def test_without_gradient_nothing_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recomputed, "before", lambda *_: pytest.fail("there will be no backward"))
    with torch.no_grad():
        made("mhc")(torch.zeros(1, 4, dtype=torch.long))
