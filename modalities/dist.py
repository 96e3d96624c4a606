"""This process among the others: rank, device, mesh, and sums over ranks."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from modalities import ranks

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Rank facts. `mesh` is None for one process, which then needs no process group."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def setup() -> Iterator[World]:
    """The world for as long as the context lasts: NCCL where there are GPUs, gloo on CPUs, nothing for one process."""
    rank, local_rank, size = ranks.rank(), ranks.local_rank(), ranks.world_size()
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun started process {local_rank} of this machine, which has {torch.cuda.device_count()} GPU(s); "
                "lower --nproc_per_node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    # Compiled code would sum an embedding's gradient in whatever order its threads come by, and no run would repeat.
    torch.use_deterministic_algorithms(device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if size <= 1:
        yield World(0, 1, device, None)
        return
    # Two back ends under CUDA: metrics and checkpoints also move CPU tensors.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend)
    try:
        yield World(rank, size, device, init_device_mesh(device.type, (size,), mesh_dim_names=("shard",)))
        barrier()
    finally:
        # A thread of gloo's that still holds the last collective's tensor when Python ends would abort the process.
        time.sleep(0.1)
        torch.distributed.destroy_process_group()


PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "MI300X": 1307e12}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of one device after its maker's data sheet; None for one that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for model, flops in PEAK_FLOPS.items() if model in name), None)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all ranks, in place; `tensor` itself in one process."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def gather_objects(value: T) -> list[T]:
    """The `value` of every rank, in the order of ranks, on every rank."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """A user's mistake (ValueError, OSError) that shows on some ranks is raised on all, so that none goes on alone."""
    problem = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = str(error)
        if not torch.distributed.is_initialized():
            raise
    problems = [text for text in gather_objects(problem) if text is not None]
    if problems:
        raise ValueError(problems[0])


def broadcast_from_main(value: T) -> T:
    """Rank 0's `value` on every rank; what the others pass is not looked at."""
    if not torch.distributed.is_initialized():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for all ranks."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
