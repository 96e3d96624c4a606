"""The tensors of a checkpoint in the format of torch.distributed.checkpoint: `.metadata` and `*.distcp`.

They are written in several files at once and hashed meanwhile, and read without executing anything that they hold.
"""

import hashlib
import math
import pickle
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view
from torch.futures import Future
from torch.utils.serialization import config as serialization

from modalities import ranks
from modalities.durable import Files, HashedFile, cores, hashed

# One process is meant. Not around each call, for filters are the process's, and calls are also made in threads.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

METADATA = ".metadata"
BYTES_PER_FILE = 1 << 28
"""A rank that has more writes several files at once, as many as it has cores at most."""

# What a `.metadata` is made of, and all that it may name: none of these does anything but hold values.
ADMITTED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {str(value)[6:] for value in vars(torch).values() if isinstance(value, torch.dtype)},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}  # fmt: skip


class MetadataUnpickler(pickle.Unpickler):
    """`.metadata` is a plain pickle, which could call anything: here it finds nothing but what metadata needs."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in ADMITTED.get(module, ()):
            raise ValueError(f"it names {module}.{name}, which no checkpoint needs: do not trust where it came from")
        return super().find_class(module, name)


def write(folder: Path, tensors: Mapping[str, Any], parts: Mapping[str, Tensor], group: ProcessGroup | None) -> Files:
    """Write `parts`, this rank's of the nested `tensors`, to `folder`; all ranks of `group` together.

    `parts` has the names of `tensors` joined by dots. Returns what this rank wrote: it is on the disk.
    """
    writer = Writer(folder)
    with in_one_line():
        planner = PartsPlanner(parts)
        dcp.save(dict(tensors), storage_writer=writer, planner=planner, process_group=group, no_dist=not distributed())
    return writer.hashing.files


def read(reader: "Reader", tensors: dict[str, Any]) -> None:
    """Read the nested `tensors` in place, of a sharded one this rank's part."""
    with in_one_line():
        # What this rank needs is in its own tensors and in the metadata: nothing has to be agreed upon.
        dcp.load(tensors, storage_reader=reader, no_dist=True)


def read_metadata(folder: Path, files: Files) -> Metadata:
    """The `.metadata` of a checkpoint; a ValueError if it is not the one that `files` knows, or none at all."""
    content = (folder / METADATA).read_bytes()
    if METADATA not in files or hashlib.sha256(content).hexdigest() != files[METADATA]["sha256"]:
        raise ValueError(f"{METADATA} is not what was saved")
    try:
        metadata = MetadataUnpickler(BytesIO(content)).load()
        strays = {info.relative_path for info in metadata.storage_data.values()} - files.keys()
    except ValueError:
        raise
    except Exception as error:  # a pickle that somebody wrote by hand can fail in any way
        raise ValueError(f"{METADATA} is none: {error!r}") from None
    if strays:
        raise ValueError(f"{METADATA} names the file {min(strays)}, which the manifest does not")
    return metadata


class HashingFileSystem(FileSystem):
    """Where DCP writes its files: each is hashed as it is written, and on the disk before it is said to be there."""

    def __init__(self) -> None:
        self.files: Files = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[HashedFile]:  # type: ignore[override]
        with hashed(path) as file:
            yield file
        self.files[path.name] = file.facts

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.files[new_path.name] = self.files.pop(path.name)


class Writer(dcp.FileSystemWriter):
    """DCP's writer of files, but several at once, with the tensors' bytes gone through once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=False)  # `hashed` does that
        self.fs = self.hashing = HashingFileSystem()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        names = (f"{plan.storage_data.prefix}{i}{DEFAULT_SUFFIX}" for i in range(len(plan.items)))
        future: Future[list[WriteResult]] = Future()
        with ThreadPoolExecutor(cores(ranks.local_world_size())) as pool:
            # DCP's own threads lose what is raised in them, and with it tensors.
            written = [pool.submit(self.write_file, *each, planner) for each in zip(names, split(plan.items))]  # noqa: B905
        future.set_result([result for file in written for result in file.result()])
        return future

    def write_file(self, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        results = []
        # The CRC of each tensor would take longer than the hash of all, which a processor has instructions for.
        no_crc = serialization.patch("save.compute_crc32", False)  # type: ignore[attr-defined]
        with no_crc, hashed(Path(self.path) / name) as file:
            for item in items:
                tensor, start = planner.resolve_data(item), file.tell()
                assert isinstance(tensor, Tensor)
                tensor = tensor.detach().cpu()
                # torch.save would write all of the memory that the tensor is a part of.
                tensor = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
                torch.save(tensor, file)  # type: ignore[arg-type]
                length = file.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
        self.hashing.files[name] = file.facts
        return results


def split(items: list[WriteItem]) -> list[list[WriteItem]]:
    """The items of each file, about as many bytes in all."""

    def size(item: WriteItem) -> int:
        assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
        return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize

    number = min(cores(ranks.local_world_size()), math.ceil(sum(map(size, items)) / BYTES_PER_FILE)) or 1
    files: list[list[WriteItem]] = [[] for _ in range(number)]
    sizes = [0] * number
    for item in sorted(items, key=size, reverse=True):
        smallest = sizes.index(min(sizes))
        files[smallest].append(item)
        sizes[smallest] += size(item)
    return [file for file in files if file]


class PartsPlanner(DefaultSavePlanner):
    """Plans by the shapes of the tensors that are to be saved, and takes their values from elsewhere."""

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.parts = parts

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.parts[index.fqn]


class Reader(dcp.FileSystemReader):
    """DCP's reader of a folder whose manifest names `files`, but several at once, and without a copy in between.

    A ValueError where its `.metadata` is to be refused.
    """

    def __init__(self, folder: Path, files: Files) -> None:
        super().__init__(folder)
        self.folder, self.metadata = folder, read_metadata(folder, files)

    def read_metadata(self) -> Metadata:
        return self.metadata

    def has(self, kind: str) -> bool:
        """Whether tensors of that kind, under that name, were saved."""
        return any(name.startswith(f"{kind}.") for name in self.metadata.state_dict_metadata)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            if item.type != LoadItemType.TENSOR:
                raise ValueError(f"{item.dest_index.fqn} is no tensor")  # but an object, which DCP would unpickle
            by_file[self.storage_data[item.storage_index].relative_path].append(item)
        future: Future[None] = Future()
        with ThreadPoolExecutor(cores(ranks.local_world_size())) as pool:
            reading = [pool.submit(self.read_file, name, items, planner) for name, items in by_file.items()]
        for file in reading:
            file.result()
        future.set_result(None)
        return future

    @torch.no_grad()  # which holds for a thread: autograd would refuse to narrow a view of what another thread fills
    def read_file(self, name: str, items: list[ReadItem], planner: LoadPlanner) -> None:
        kinds: dict[bytes, Tensor] = {}
        with (self.folder / name).open("rb", buffering=0) as file:
            for item in items:
                info, target = self.storage_data[item.storage_index], planner.resolve_tensor(item).detach()
                view: Any = _create_file_view(file, info.offset, info.length)
                zipped: Any = torch._C.PyTorchFileReader(view)
                # What a tensor is but for its values is the same pickle for many, and takes longer than most values do.
                pickled = zipped.get_record("data.pkl")
                if pickled not in kinds:
                    view.seek(0)
                    with torch.serialization.skip_data():
                        kinds[pickled] = torch.load(view, map_location="cpu", weights_only=True)
                if target.is_cpu and is_same_kind(kinds[pickled], target):
                    file.seek(info.offset + zipped.get_record_offset("data/0"))
                    read_into(file, target.view(-1).view(torch.uint8))
                else:
                    view.seek(0)
                    saved = torch.load(view, map_location="cpu", weights_only=True)
                    target.copy_(narrow_tensor_by_index(saved, item.storage_offsets, item.lengths))
                planner.commit_tensor(item, target)


def is_same_kind(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same values where their memory is the same."""
    return one.shape == other.shape and one.dtype == other.dtype and one.is_contiguous() and other.is_contiguous()


def read_into(file: FileIO, memory: Tensor) -> None:
    """Fill `memory`, uint8 [N], from where `file` stands."""
    rest = memory.numpy().data
    while rest:
        count = file.readinto(rest)
        if not count:
            raise ValueError(f"{file.name} ends within a tensor")
        rest = rest[count:]


def distributed() -> bool:
    return torch.distributed.is_initialized()


@contextmanager
def in_one_line() -> Iterator[None]:
    """What fails within DCP is told by its first cause, on all ranks that DCP asked; a lost peer stays what it was."""
    try:
        yield
    except CheckpointException as error:  # no Exception, so nobody else would catch it
        why = next(iter(error.failures.values()))[0]
        if not isinstance(why, Exception):  # an interrupt
            raise why from None
        raise ranks.error_of(ranks.status_of(why), " ".join(str(why).split())) from None
