"""On a GPU: bitwise the same losses wherever ids are kept, and no wait for the device."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from geodiag.hooks.routing.anticipatory import AnticipatoryRouting
from geodiag.hooks.routing.base import Rerouting
from geodiag.hooks.routing.router_lag import RouterLag
from geodiag.reference_models.config import sized
from geodiag.reference_models.data import Batch
from geodiag.reference_models.train import TrainConfig, Trainer
from geodiag.reference_models.transformer import Transformer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@contextmanager
def nothing_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def made() -> tuple[Trainer, list[Batch]]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Transformer(sized("tiny", dtype="bfloat16"))
    t = Trainer(model, TrainConfig(steps=50, sequences=4, warmup=4, lr=1e-2))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(256, (10, 4, 65), generator=generator).cuda()
    return t, [
        Batch(s, x[:, :-1].contiguous(), x[:, 1:].contiguous(), ("x",) * 4)
        for s, x in enumerate(ids)
    ]


def losses(variant: str | None, delay: int = 0, device_bytes: int = 1 << 28) -> Tensor:
    t, batches = made()
    routing: Rerouting | None = None
    if variant == "anticipatory":
        routing = AnticipatoryRouting(
            t.model, delay, forward=lambda m, b: m(b.token_ids_BS), device_bytes=device_bytes
        )
    elif variant == "router-lag":
        routing = RouterLag(t.model, delay, device_bytes=device_bytes)
    if routing is None:
        return torch.stack([t.step(b).loss for b in batches])
    routing.enable()
    return torch.stack([t.step(batch).loss for batch in routing.batches(batches)])


def test_delay_zero_gives_bitwise_the_plain_losses_wherever_ids_wait() -> None:
    plain = losses(None)
    assert torch.equal(losses(None), plain), "this machine repeats itself"
    for room in (0, 1 << 28):
        assert torch.equal(losses("anticipatory", 0, room), plain)
        assert torch.equal(losses("router-lag", 0, room), plain)
    assert not torch.equal(losses("anticipatory", 3), plain), "the twin: a delay is seen"
    assert not torch.equal(losses("router-lag", 3), plain)


@pytest.mark.parametrize("variant", ["anticipatory", "router-lag"])
def test_where_things_wait_changes_nothing(variant: str) -> None:
    assert torch.equal(losses(variant, 3, 0), losses(variant, 3, 1 << 28))


@pytest.mark.parametrize("variant", ["anticipatory", "router-lag"])
@pytest.mark.parametrize("room", [0, 1 << 28])
def test_nothing_waits_for_the_device(variant: str, room: int) -> None:
    t, batches = made()
    routing: Rerouting = (
        AnticipatoryRouting(t.model, 2, forward=lambda m, b: m(b.token_ids_BS), device_bytes=room)
        if variant == "anticipatory"
        else RouterLag(t.model, 2, device_bytes=room)
    )
    routing.enable()
    data = routing.batches(batches)
    for _ in range(5):
        t.step(next(data))
    assert routing.mode == "on"
    with nothing_waits():
        batch = next(data)
        t.model(batch.token_ids_BS)
    with pytest.raises(RuntimeError), nothing_waits():
        batch.token_ids_BS.sum().item()
