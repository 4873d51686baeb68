"""A training of several ranks under torchrun: this rank, its device, its share of a step."""

import os
import warnings
from typing import TYPE_CHECKING, Any

from geodiag.errors import GeodiagError

if TYPE_CHECKING:
    from torch import nn

    from geodiag.reference_models.data import Batch


class RankInfo:
    """Rank and device of this process; a process that torchrun did not start is the only rank.

    GeodiagError if there are fewer GPUs than ranks.
    """

    def __init__(self, device: str) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device_name = device
        if self.world > 1:
            self._join(device)

    def _join(self, device: str) -> None:
        import torch
        import torch.distributed as dist

        local = int(os.environ.get("LOCAL_RANK", 0))
        backend = "gloo"
        if device.startswith("cuda:"):
            # All ranks share this GPU, for trials on a machine with one GPU; NCCL refuses that.
            self.device_name = device
        elif device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
            self.device_name = "cpu"
        else:
            self.device_name = f"cuda:{local}"
            backend = "nccl"
            available = torch.cuda.device_count()
            if local >= available:
                raise GeodiagError(
                    f"rank {local} of this machine has no GPU of its own: there are {available}; "
                    "pass --device cpu, or --device cuda:0 to share one"
                )
        if self.device_name != "cpu":
            torch.cuda.set_device(self.device_name)
        if not dist.is_initialized():
            dist.init_process_group(backend)

    def broadcast(self, value: str) -> str:
        """Return the `value` of rank 0 on every rank."""
        if self.world == 1:
            return value
        import torch
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device(self.device_name))
        return values[0]

    def share(self, sequences: int, micro_batches: int) -> int:
        """Return this rank's number of sequences. GeodiagError if they cannot be divided evenly."""
        if self.world > 1 and sequences % (self.world * micro_batches):
            parts = f"{self.world} ranks"
            if micro_batches > 1:
                parts += f" of {micro_batches} micro-batches"
            fits = self.world * micro_batches
            raise GeodiagError(
                f"{sequences} sequences do not divide among {parts}; "
                f"pass --sequences {fits} or a multiple"
            )
        return sequences // self.world

    def local_part(self, batch: "Batch") -> "Batch":
        """Return this rank's sequences of a step: every `world`-th, so that domains stay mixed."""
        if self.world == 1:
            return batch
        mine = slice(self.rank, None, self.world)
        return batch._replace(
            token_ids_BS=batch.token_ids_BS[mine],
            targets_BS=batch.targets_BS[mine],
            domain_B=batch.domain_B[mine],
        )

    def parallelize(self, model: Any, parallel: str) -> "nn.Module":
        """Return the model to call: itself on one rank, sharded in place (`fsdp`), or in DDP."""
        if self.world == 1:
            return model
        if parallel == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
            return model
        from torch.nn.parallel import DistributedDataParallel

        with warnings.catch_warnings():
            # Newer torch has another name for broadcast_buffers.
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(model, broadcast_buffers=False)

    def leave(self) -> None:
        """Leave the process group; the training is over."""
        if self.world > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()
