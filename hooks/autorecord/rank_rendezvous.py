"""Whether all ranks are about to train, found out without a collective that could block for ever.

Recording several ranks begins with a collective. If only some ranks train (the others serve,
evaluate, generate), those would wait in it for ever. So each rank writes to the process group's
key-value store that it is present, and one key, set by the first rank that decides, holds the
decision for all.
"""

from datetime import timedelta

import torch.distributed as dist

from geodiag.hooks import torch_internals

TIMEOUT = timedelta(minutes=2)
"""How long ranks wait for each other's first forward."""


def all_ranks_present(timeout: timedelta = TIMEOUT) -> bool:
    """Return whether all ranks train; the same answer on every rank."""
    if _single_process():
        return True
    store = torch_internals.default_store()
    store.set(f"geodiag/here/{dist.get_rank()}", "here")
    try:
        store.wait([f"geodiag/here/{rank}" for rank in range(dist.get_world_size())], timeout)
        decision = "begin"
    except RuntimeError:
        decision = "leave"
    return store.compare_set("geodiag/word", "", decision) == b"begin"


def value_of_rank_0(value: str) -> str:
    """Return rank 0's `value` on every rank. Call it only if all ranks are present."""
    if _single_process():
        return value
    store = torch_internals.default_store()
    if dist.get_rank() == 0:
        store.set("geodiag/first", value)
    return store.get("geodiag/first").decode()


def _single_process() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
