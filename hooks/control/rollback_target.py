"""Which snapshot a rollback restores."""

from collections.abc import Sequence


def rollback_target(
    snapshots: Sequence[int],
    onset: int,
    *,
    warm_up: int,
    restored_step: int,
    rolled_back_from: int,
) -> int | None:
    """Return the newest snapshot from strictly before the onset, None if there is none.

    warm_up: steps that routing needs before the onset; a snapshot that leaves so many is preferred.
    restored_step, rolled_back_from: the last rollback. If it did not help, because the spike is
    in the steps it repeated, an older snapshot is preferred: the same snapshot and the same batches
    would lead to the same spike.
    """
    before = [s for s in snapshots if s < onset]
    if not before:
        return None
    if onset <= rolled_back_from:
        older = [s for s in before if s < restored_step]
        if older:
            return max(older)
    with_warm_up = [s for s in before if s + warm_up <= onset]
    return max(with_warm_up or before)
