"""Several GPUs, one process each: gradients are averaged, the first process decides."""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from lib.errors import TrainingError

TIMEOUT = timedelta(minutes=30)  # the others wait while the first one measures


@dataclass(frozen=True)
class Ranks:
    """One process among `count`; alone, nothing is sent.

    Attributes:
        rank: 0 saves, measures and reports.
        count: number of processes.
        device: of this process.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process saves and reports."""
        return self.rank == 0

    def average_gradients(self, net: nn.Module) -> None:
        """Replace each gradient by the mean over all processes."""
        if self.count == 1:
            return
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= self.count
        start = 0
        for grad in grads:
            grad.copy_(flat[start : start + grad.numel()].view_as(grad))
            start += grad.numel()

    def agreed(self, flag: bool) -> bool:
        """What the first process says."""
        if self.count == 1:
            return flag
        said = torch.tensor([int(flag)], device=self.device)
        dist.broadcast(said, 0)
        return bool(said.item())


def devices_for(device: torch.device, *, several: bool) -> list[str]:
    """The devices to train on: all GPUs where no one in particular was chosen."""
    count = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
    if several and count > 1:
        return [f"cuda:{index}" for index in range(count)]
    return [str(device)]


def run_on(devices: list[str], work: Callable[[Ranks, Any], None], argument: Any) -> None:
    """Call `work(ranks, argument)` here, or in one new process for each of several devices.

    What it finds has to be written to files, since the processes share nothing.

    Raises:
        TrainingError: one of several processes failed; the others are ended.
    """
    if len(devices) == 1:
        work(Ranks(torch.device(devices[0])), argument)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        spawn(_enter, args=(devices, port, work, argument), nprocs=len(devices), join=True)
    except (ProcessRaisedException, ProcessExitedException) as error:
        reason = str(error).strip().splitlines()[-1]
        msg = f"The training on {len(devices)} devices ended: {reason}"
        raise TrainingError(msg) from error


def _enter(
    rank: int, devices: list[str], port: int, work: Callable[[Ranks, Any], None], argument: Any
) -> None:
    device = torch.device(devices[rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=len(devices),
        timeout=TIMEOUT,
    )
    try:
        work(Ranks(device, rank, len(devices)), argument)
    finally:
        dist.destroy_process_group()
