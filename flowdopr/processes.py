"""The processes of this launch, as accelerate knows them, and the memory of this one."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

REFUSED = ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")
"""Ways to share a model over processes that accelerate's environment may ask for, except FSDP2."""

MALLOC_TRIM, MALLOC_MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # bytes; glibc takes no larger one


def this_process() -> PartialState:
    """This process and its rank among the processes of the launch.

    On a machine without a GPU, accelerate connects the processes only if it is told to use the CPU;
    otherwise each process would act as the only one.

    Raises:
        ValueError: see `check_launch`.
    """
    check_launch()
    keep_freed_memory()
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu)


def check_launch() -> None:
    """Refuse an environment that asks accelerate for more than data parallelism and FSDP2.

    Raises:
        ValueError: names the variable.
    """
    for name in REFUSED:
        variable = f"ACCELERATE_USE_{name}"
        if parse_flag_from_env(variable):
            raise ValueError(
                f"{variable}={os.environ[variable]}: flowdopr shares batches over processes (DDP), "
                "and weights by FSDP2; unset it, or choose multi-GPU or FSDP in accelerate's config"
            )
    if asks_for_shards() and os.environ.get("FSDP_VERSION") != "2":
        raise ValueError(
            f"FSDP_VERSION={os.environ.get('FSDP_VERSION', 1)}: flowdopr shares weights by FSDP2; "
            "set fsdp_version: 2 in accelerate's config"
        )


def asks_for_shards() -> bool:
    """Whether accelerate's environment asks for weights shared out over processes (FSDP)."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def keep_freed_memory() -> None:
    """Let the C library of Linux keep the memory that tensors free.

    It would give large blocks back to the system, which zeroes them, page by page, when they are
    asked for again a moment later: a tenth of a small model's training step.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(MALLOC_MMAP, LARGEST_MMAP_THRESHOLD)
        library.mallopt(MALLOC_TRIM, 2**31 - 1)


def device_of(state: PartialState) -> torch.device:
    """The device of this process."""
    return state.device or torch.device("cpu")


class Agreement:
    """Numbers that every process of a launch reports, and of which all learn the largest.

    The hosts exchange them, so that no process waits for its device. All processes must make one.
    """

    def __init__(self, num_processes: int, timeout: float):
        """timeout: seconds to wait for the other processes."""
        self.group: Any = None
        if num_processes > 1:
            wait = timedelta(seconds=timeout)
            self.group = torch.distributed.new_group(backend="gloo", timeout=wait)

    def largest(self, *numbers: int) -> list[int]:
        """Each number, or a larger one of another process; all processes must call it."""
        if self.group is None:
            return list(numbers)
        found = torch.tensor(numbers)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, self.group)
        return found.tolist()


def gathered(value: Any, state: PartialState) -> list[Any] | None:
    """`value` of every process in their order, in the first process; None in the others."""
    if state.num_processes == 1:
        return [value]
    found = [None] * state.num_processes if state.is_main_process else None
    torch.distributed.gather_object(value, found)
    return found


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process in MiB: allocated on a CUDA device, else resident.

    Systems other than Linux and Windows tell only the memory that is resident now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if peak:  # a new process inherits its parent's `ru_maxrss`, but not this number
        return int(peak[1]) / 2**10
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss) / 2**20
