"""How ranks come together and part: whether every one of them is about to train, asked without
being able to hang.

Watching a training of many ranks begins with a collective. Where only some ranks train (the others
serve, evaluate, generate) those would wait in it for ever. So each says in the group's key-value
store that it is here, and one key, which the first to decide sets for all, says whether they begin.
"""

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PATIENCE = timedelta(minutes=2)
"""So long the ranks wait for each other's first forward."""


def before_they_part(call: Callable[[], None]) -> None:
    """Has `call` called before the process group is destroyed, and every other group with it."""
    if not dist.is_available():
        return
    original = dist.destroy_process_group

    @functools.wraps(original)
    def destroy_process_group(group: Any = None) -> None:
        if group is None or group == dist.group.WORLD:
            call()
        original(group)

    dist.destroy_process_group = destroy_process_group


def all_here(patience: timedelta = PATIENCE) -> bool:
    """Whether all ranks begin now; the same answer on every rank."""
    if _alone():
        return True
    store = dist.distributed_c10d._get_default_store()
    store.set(f"geodiag/here/{dist.get_rank()}", "here")
    try:
        store.wait([f"geodiag/here/{rank}" for rank in range(dist.get_world_size())], patience)
        word = "begin"
    except RuntimeError:
        word = "leave"
    return store.compare_set("geodiag/word", "", word) == b"begin"


def of_the_first(word: str) -> str:
    """Rank 0's word, on every rank that has heard that all are here."""
    if _alone():
        return word
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        store.set("geodiag/first", word)
    return store.get("geodiag/first").decode()


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
