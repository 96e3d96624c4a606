"""This process among the others: rank, device, mesh, and sums over ranks."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from modalities import ranks
from modalities.compiling import use_cache

T = TypeVar("T")
STORE_ERRORS = (torch.distributed.DistError, ConnectionError, TimeoutError)
"""What a store that does not answer raises."""
LOST = ("/gloo/", "ncclRemoteError", "ncclInternalError", "NCCL communicator was aborted", "NCCL watchdog")
"""What gloo and NCCL say when a peer is gone; the errors have no type of their own."""


class PeersLost(SystemExit):
    """The end of this process, because others are gone: one line on stderr, and the status HUNG."""

    def __init__(self, line: str) -> None:
        super().__init__(ranks.HUNG)
        self.line = line
        print(line, file=sys.stderr, flush=True)
        # What is left to close may wait for the peers as well.
        alarm = threading.Timer(10.0, os._exit, (ranks.HUNG,))
        alarm.daemon = True
        alarm.start()


def cause(error: BaseException) -> str:
    """What gloo or NCCL say of it, without where in their source, and without advice."""
    return str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0]


def lost_peers(error: BaseException) -> bool:
    """Whether `error` came of a peer that is gone."""
    if not torch.distributed.is_initialized():
        return False
    return isinstance(error, torch.distributed.DistError) or any(text in str(error) for text in LOST)


@dataclass(frozen=True)
class World:
    """Rank facts. `mesh` is None for one process, which then needs no process group."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None
    """Dimensions "replicate" and "tensor" where there are such, and "shard" always; the last is contiguous in ranks."""
    tensor: int = 1
    """Ranks that share each tensor, and therefore read the same part of a batch."""
    data_group: ProcessGroup | None = None
    """The ranks that read each part of a batch once, this one among them; None: all."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which part of a batch is this rank's."""
        return self.rank // self.tensor

    @property
    def data_size(self) -> int:
        """Parts of a batch."""
        return self.size // self.tensor


def degrees(size: int, replicate: int, shard: int, tensor: int) -> tuple[int, int, int]:
    """The three degrees of `parallel`, the shard's -1 resolved; a ValueError if they do not make up `size` ranks."""
    if shard == -1:
        shard = max(1, size // (replicate * tensor))
    if replicate * shard * tensor != size:
        raise ranks.RanksError(
            f"parallel.replicate {replicate} × parallel.shard {shard} × parallel.tensor {tensor} = "
            f"{replicate * shard * tensor}, but the number of ranks is {size}; change one of them"
        )
    return replicate, shard, tensor


@contextlib.contextmanager
def setup(replicate: int = 1, shard: int = -1, tensor: int = 1) -> Iterator[World]:
    """The world for as long as the context lasts: NCCL where there are GPUs, gloo on CPUs, nothing for one process.

    `ValueError` if the degrees do not make up the number of ranks.
    """
    use_cache()  # before anything loads the compiler, which settles the place of its programs as it is loaded
    rank, local_rank, size = ranks.rank(), ranks.local_rank(), ranks.world_size()
    sizes = dict(zip(("replicate", "shard", "tensor"), degrees(size, replicate, shard, tensor), strict=True))
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
        ranks.meet()
        yield World(0, 1, device, None)
        return
    # Two back ends under CUDA: metrics and checkpoints also move CPU tensors.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend)
    ranks.meet()
    try:
        sizes = {name: n for name, n in sizes.items() if n > 1 or name == "shard"}
        mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        data_group = None
        if tensor > 1:
            members = [list(range(first, size, tensor)) for first in range(tensor)]
            data_group, _ = torch.distributed.new_subgroups_by_enumeration(members)
        yield World(rank, size, device, mesh, tensor, data_group)
        barrier()
    except Exception as error:
        if not lost_peers(error):
            raise
        raise PeersLost(
            f"rank {rank} lost its peers before its first step, or after its last: {cause(error)}"
        ) from None
    finally:
        # A thread of gloo's that still holds the last collective's tensor when Python ends would abort the process.
        time.sleep(0.1)
        torch.distributed.destroy_process_group()


def sum_over_ranks(tensor: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The sum of `tensor` over the ranks of `group` (None: all), in place; `tensor` itself in one process."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor, group=group)
    return tensor


def gather_objects(value: T, group: ProcessGroup | None = None) -> list[T]:
    """The `value` of every rank of `group` (None: all), in the order of ranks, on every rank."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group)
    return values


@contextlib.contextmanager
def all_or_none(group: ProcessGroup | None = None) -> Iterator[None]:
    """A ValueError or OSError on some ranks is raised on all, of the same status, so that none goes on alone."""
    problem = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = ranks.status_of(error), str(error)
        if not torch.distributed.is_initialized():
            raise
    problems = [found for found in gather_objects(problem, group) if found is not None]
    if problems:
        raise ranks.error_of(*problems[0])


def broadcast_from_main(value: T, group: ProcessGroup | None = None) -> T:
    """Rank 0's `value` on every rank; what the others pass is not looked at."""
    if not torch.distributed.is_initialized():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, group=group)
    return box[0]


def barrier() -> None:
    """Wait for all ranks."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
