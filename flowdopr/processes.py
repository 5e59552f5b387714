"""The processes of this launch, as accelerate knows them."""

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def this_process() -> PartialState:
    """This process among those of its launch.

    Without an accelerator accelerate joins the processes only if told that they run on the CPU;
    otherwise each would take itself for the only one.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu)


def device_of(state: PartialState) -> torch.device:
    """The device of this process."""
    return state.device or torch.device("cpu")
