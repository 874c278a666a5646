"""Several processes under torch.distributed: who runs which batches, and how their findings come together.

Each process is as far as the others at every call of `gathered`, because all of them walk through the same program.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist


def world() -> int:
    """How many processes work together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, 0 for the one that writes."""
    return dist.get_rank() if world() > 1 else 0


def mine(count: int) -> Sequence[int]:
    """The batches of `count` that this process runs: consecutive ones, shares that differ by one at most."""
    first, last = (count * each // world() for each in (rank(), rank() + 1))
    return range(first, last)


def gathered(value: Any) -> list[Any]:
    """What every process has, in the order of their numbers."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def together() -> None:
    """Wait until every process is here."""
    if world() > 1:
        dist.barrier()


def join() -> bool:
    """Join the processes that `torchrun` started, over gloo; false where it started none or this one has joined."""
    if not dist.is_available() or dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    dist.init_process_group("gloo")
    return True


def leave(joined: bool) -> None:
    """Leave the processes that `join` joined."""
    if joined:
        dist.destroy_process_group()
