"""Two processes that work together by gloo, started as those of a study, which is quick."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from flowdopr.compare.worker import process_context


def on_two_ranks(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `work(rank)`, a function of a module, returns on each of two ranks."""
    method = process_context().get_start_method()
    mp.start_processes(_start, (work, folder), nprocs=2, start_method=method)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def _start(rank: int, work: Callable[[int], Any], folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.barrier()  # a rank that leaves first may take the other one with it
    dist.destroy_process_group()
