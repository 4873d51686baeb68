"""Small training scripts that know nothing of geodiag, for the tests of `geodiag run`. Each prints
its losses.
"""

FEW = """
import importlib.util
import sys

assert importlib.util.find_spec("torch")  # looking is not importing
import torch
from torch import nn
from torch.nn.functional import cross_entropy

torch.manual_seed(0)
torch.set_num_threads(1)


class Blocks(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.embed = nn.Embedding(40, width)
        block = lambda: nn.Sequential(nn.Linear(width, width), nn.Dropout(0.1))
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(width, 40)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def batch():
    return torch.randint(40, (4, 12))


def loss_of(model, ids):
    return cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)
"""
"""Imported by all of them."""

PLAIN = """
from few import *

model = Blocks()
optimizer = adamw(model)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
for _ in range(4):
    loss = loss_of(model, batch())
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    print(loss.item(), flush=True)
"""

ACCUMULATED = """
from few import *

model = Blocks()
optimizer = adamw(model)
for _ in range(3):
    total = 0.0
    for _ in range(2):
        loss = loss_of(model, batch()) / 2
        loss.backward()
        total += loss.detach()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    print(norm.item(), file=sys.stderr)
    print(total.item())
"""

TWO_OPTIMIZERS = """
from few import *

model = Blocks()
matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
optimizers = torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)
for step in range(6):
    loss = loss_of(model, batch())
    loss.backward()
    for optimizer in optimizers[: 1 if step in (0, 2, 5) else 2]:
        optimizer.step()
        optimizer.zero_grad()
    print(loss.item())
"""

EVALUATED = """
from few import *

teacher = Blocks().requires_grad_(False)
model = Blocks(24)
idle = torch.optim.SGD([nn.Parameter(torch.zeros(3))])
optimizer = adamw(model)
for _ in range(3):
    ids = batch()
    wanted = teacher(ids)  # with gradient enabled, and none of it is trained
    loss = cross_entropy(model(ids=ids).flatten(0, 1), wanted.softmax(-1).flatten(0, 1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            loss_of(model, batch())
    model.train()
    print(loss.item())
"""

ADVERSARIES = """
from few import *

first, second = Blocks(), Blocks()
optimizers = adamw(first), adamw(second)
for _ in range(3):
    for model, optimizer in zip((first, second), optimizers):
        loss = loss_of(model, batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if model is first:
            print(loss.item())
"""

SCALED = """
from few import *

model = Blocks()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=2)
for step in range(4):
    loss = loss_of(model, batch())
    (scaler.scale(loss) if step < 3 else scaler.scale(loss) * 1.0).backward()
    if step == 1:
        model.head.bias.grad[0] = torch.inf  # this step the scaler skips
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    print(loss.item())
"""

LATE = """
from few import *

model = Blocks()
for step in range(3):
    loss = loss_of(model, batch())
    if step == 0:
        optimizer = adamw(model)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(loss.item())
"""

CLOSURE = """
from few import *

model = Blocks()
optimizer = adamw(model)


def closure():
    optimizer.zero_grad()
    loss = loss_of(model, batch())
    loss.backward()
    return loss


for _ in range(3):
    print(optimizer.step(closure).item())
"""

COMPILED = """
from few import *

model = Blocks()
compiled = torch.compile(model, backend="eager")
optimizer = adamw(model)
for _ in range(3):
    loss = loss_of(compiled, batch())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(loss.item())
"""

IN_PLACE = COMPILED.replace('torch.compile(model, backend="eager")', "model").replace(
    "optimizer =", 'model.compile(backend="eager", fullgraph=True)\noptimizer ='
)

BY_LAYER = COMPILED.replace('torch.compile(model, backend="eager")', "model").replace(
    "optimizer =", 'for block in model.blocks[:2]:\n    block.compile(backend="eager")\noptimizer ='
)

COMPILED_STEP = """
from few import *

model = Blocks()
optimizer = adamw(model)
step = torch.compile(lambda: optimizer.step(), backend="eager")
for _ in range(3):
    loss = loss_of(model, batch())
    loss.backward()
    step()
    optimizer.zero_grad()
    print(loss.item())
"""

RESUMED = """
from few import *

model = Blocks()
optimizer = adamw(model)
for p in model.parameters():
    p.grad = torch.zeros_like(p)
state = optimizer.state_dict()
state["state"] = {
    i: {
        "step": torch.tensor(900.0),
        "exp_avg": torch.zeros_like(p),
        "exp_avg_sq": torch.ones_like(p),
    }
    for i, p in enumerate(model.parameters())
}
optimizer.load_state_dict(state)
for _ in range(2):
    loss = loss_of(model, batch())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(loss.item())
"""

IN_BACKWARD = """
from few import *

model = Blocks()
optimizers = {p: torch.optim.SGD([p], lr=1e-2) for p in model.parameters()}
for p in model.parameters():
    p.register_post_accumulate_grad_hook(
        lambda p: (optimizers[p].step(), optimizers[p].zero_grad()) and None
    )
for _ in range(3):
    loss = loss_of(model, batch())
    loss.backward()
    print(loss.item())
"""

EXPERTS = """
from few import *
from geodiag.reference_models.config import ModelConfig
from geodiag.reference_models.transformer import Transformer

torch.manual_seed(0)
size = dict(layers=2, channels=16, heads=2, head_dim=8, sequence=12, experts=4, expert_dim=12)
model = Transformer(ModelConfig(vocab=40, residual="mhc", kernels="reference", **size))
optimizer = adamw(model)
for _ in range(2):
    ids = batch()
    loss = cross_entropy(model(ids).logits_BSV.flatten(0, 1), ids.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(loss.item())
"""

SPREAD = """
from few import *
import os
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
model = Blocks()
if sys.argv[1] == "ddp":
    model = DistributedDataParallel(model)
else:
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
optimizer = adamw(model)
torch.manual_seed(1 + rank)
for _ in range(3):
    loss = loss_of(model, batch())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with open(f"losses-{rank}", "a") as file:
        print(loss.item(), file=file)
dist.destroy_process_group()
"""

SPAWNED = """
from few import *
import torch.multiprocessing as mp
from torch.utils.data import DataLoader


def train(_):
    model = Blocks()
    optimizer = adamw(model)
    for ids in DataLoader([row for _ in range(3) for row in batch()], batch_size=4, num_workers=1):
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(loss.item(), flush=True)


if __name__ == "__main__":
    mp.spawn(train, nprocs=1)
"""

NO_BLOCKS = """
from few import *

model = nn.Linear(4, 4)
optimizer = adamw(model)
for _ in range(2):
    loss = model(torch.randn(2, 4)).square().mean()
    loss.backward()
    optimizer.step()
    print(loss.item())
"""

OWN_RECORD = """
from few import *
import geodiag

model = Blocks()
optimizer = adamw(model)
with geodiag.attach(model, optimizer, "own", quiet=True) as run:
    loss = loss_of(model, batch())
    loss.backward()
    optimizer.step()
    run.step(loss)
print(loss.item())
"""
