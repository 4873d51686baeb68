"""A training of several ranks, as torchrun starts it: who this rank is, and what its share of the
work is.
"""

import os
import warnings
from typing import TYPE_CHECKING, Any

from geodiag.errors import GeodiagError

if TYPE_CHECKING:
    from torch import nn

    from geodiag.reference_models.data import Batch


class Place:
    """This process among those of a training; one that torchrun did not start is all there is.

    GeodiagError where the ranks have no GPU each.
    """

    def __init__(self, device: str) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device_name = device
        if self.world > 1:
            self._join(device)

    def _join(self, device: str) -> None:
        import torch
        import torch.distributed as dist

        local = int(os.environ.get("LOCAL_RANK", 0))
        if device.startswith(
            "cuda:"
        ):  # one GPU for all of them, where there is but one to try things on
            self.device_name, backend = device, "gloo"
        elif device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
            self.device_name, backend = "cpu", "gloo"
        else:
            self.device_name, backend = f"cuda:{local}", "nccl"
            if local >= torch.cuda.device_count():
                have = torch.cuda.device_count()
                fix = "pass --device cpu, or --device cuda:0 to share one"
                raise GeodiagError(
                    f"rank {local} of this machine has no GPU of its own: there are {have}; {fix}"
                )
        if self.device_name != "cpu":
            torch.cuda.set_device(self.device_name)
        if not dist.is_initialized():
            dist.init_process_group(backend)

    def same(self, value: str) -> str:
        """Rank 0's `value`, on every rank."""
        if self.world == 1:
            return value
        import torch
        import torch.distributed as dist

        said = [value]
        dist.broadcast_object_list(said, src=0, device=torch.device(self.device_name))
        return said[0]

    def share(self, sequences: int, micro_batches: int) -> int:
        """How many of a step's sequences are this rank's. GeodiagError where they do not divide."""
        if self.world > 1 and sequences % (self.world * micro_batches):
            parts = f"{self.world} ranks" + (
                f" of {micro_batches} micro-batches" if micro_batches > 1 else ""
            )
            fits = self.world * micro_batches
            raise GeodiagError(
                f"{sequences} sequences do not divide among {parts}; pass --sequences {fits} or a multiple"
            )
        return sequences // self.world

    def mine(self, batch: "Batch") -> "Batch":
        """This rank's sequences of a step: every `world`-th, so that each rank sees the mix of
        domains.
        """
        if self.world == 1:
            return batch
        mine = slice(self.rank, None, self.world)
        return batch._replace(
            token_ids_BS=batch.token_ids_BS[mine],
            targets_BS=batch.targets_BS[mine],
            domain_B=batch.domain_B[mine],
        )

    def spread(self, model: Any, parallel: str) -> "nn.Module":
        """The model as this training calls it: itself, sharded in place (`fsdp`), or inside DDP."""
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
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # newer torch has another name for the same
            return DistributedDataParallel(model, broadcast_buffers=False)

    def leave(self) -> None:
        """The training is over."""
        if self.world > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()
