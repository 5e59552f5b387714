"""The processes of this launch, as accelerate knows them."""

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def this_process() -> PartialState:
    """This process and its rank among the processes of the launch.

    On a machine without a GPU, accelerate connects the processes only if it is told to use the CPU;
    otherwise each process would act as the only one.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu)


def device_of(state: PartialState) -> torch.device:
    """The device of this process."""
    return state.device or torch.device("cpu")
