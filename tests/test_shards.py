"""The tensors on disk: torch's own reader understands them, and nothing that they hold is ever executed."""

import os
import pickle
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from traceback import StackSummary
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from modalities import checkpoint, durable, shards
from modalities.step import TrainState

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def params() -> Tensors:
    """Of several shapes and types; one is a part of a larger tensor, one has its columns in rows."""
    torch.manual_seed(0)
    whole = torch.randn(100, 10)
    return {"a": torch.randn(30, 20), "b.c": torch.randn(7).bfloat16(), "part": whole[3:5], "turned": whole.T}


def zeros(params: Tensors) -> Tensors:
    return {name: torch.zeros_like(param) for name, param in params.items()}


def write(folder: Path, params: Tensors) -> durable.Files:
    return shards.write(folder, {"p": params}, {f"p.{name}": param for name, param in params.items()}, None)


def test_torch_reads_what_is_written(tmp_path: Path, params: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that they make up several files, which takes 256 MiB otherwise.
    monkeypatch.setattr(shards, "BYTES_PER_FILE", 1000)
    files = write(tmp_path, params)
    assert len(list(tmp_path.glob("*.distcp"))) == min(7, durable.cores())
    assert files == durable.hash_files(tmp_path.iterdir())
    assert sum(file["size"] for file in files.values()) < 30_000  # a part alone is written, not what it is a part of
    for read in (
        lambda found: dcp.load({"p": found}, checkpoint_id=tmp_path),
        lambda found: shards.read(shards.Reader(tmp_path, files), {"p": found}),
    ):
        found = zeros(params)
        read(found)
        assert all(torch.equal(found[name], params[name]) for name in params)


def test_what_torch_wrote_is_read(tmp_path: Path, params: Tensors) -> None:
    dcp.save({"p": params}, checkpoint_id=tmp_path)
    found = zeros(params)
    shards.read(shards.Reader(tmp_path, durable.hash_files(tmp_path.iterdir())), {"p": found})
    assert all(torch.equal(found[name], params[name]) for name in params)


class Watched(torch.Tensor):
    """Notes whether autograd looks on where a thread other than the main one does anything with it."""

    seen: list[bool] = []

    @classmethod
    def __torch_function__(cls, *call: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            cls.seen.append(torch.is_grad_enabled())
        return super().__torch_function__(*call)


def test_autograd_does_not_look_on_where_threads_fill_parts_of_one_tensor(tmp_path: Path, params: Tensors) -> None:
    # It would, at times, refuse: of a sharded tensor each thread has a view of its own.
    files = write(tmp_path, params)
    found = {name: param.as_subclass(Watched).requires_grad_() for name, param in zeros(params).items()}
    shards.read(shards.Reader(tmp_path, files), {"p": found})
    assert all(torch.equal(found[name], params[name]) for name in params)
    assert Watched.seen and not any(Watched.seen)


def test_a_full_disk_under_one_of_several_files_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that the large tensor's file is another thread's than the small one's.
    monkeypatch.setattr(shards, "BYTES_PER_FILE", 1000)
    params = {"large": torch.randn(10_000), "small": torch.randn(300)}
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ValueError, match=r"^\[Errno 27\] File too large$"):
            write(tmp_path, params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def test_an_interrupted_save_is_an_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt), shards.in_one_line():
        raise CheckpointException("write", {0: (KeyboardInterrupt(), StackSummary())})


class Payload:
    """Makes `marker` where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


def poison_metadata(folder: Path, payload: Payload) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(payload))


def poison_within_metadata(folder: Path, payload: Payload) -> None:
    metadata = read_metadata(folder)
    metadata.planner_data = {"params.a": payload}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def poison_a_dotted_name(folder: Path, payload: Payload) -> None:
    """By way of what an admitted class has for attributes."""
    module, name = "torch.distributed.checkpoint.metadata", "os.mkdir"
    code = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode()
    path = str(payload.marker).encode()
    (folder / ".metadata").write_bytes(code + b"\x93\x8c" + bytes([len(path)]) + path + b"\x85R.")


def poison_an_object(folder: Path, payload: Payload) -> None:
    """A weight that the metadata call an object, which torch would unpickle."""
    metadata = read_metadata(folder)
    metadata.state_dict_metadata["params.a"] = BytesStorageMetadata()
    index = next(index for index in metadata.storage_data if index.fqn == "params.a")
    info = metadata.storage_data.pop(index)
    file = folder / info.relative_path
    info.offset = file.stat().st_size
    with file.open("ab") as end:
        torch.save(payload, end)
        info.length = end.tell() - info.offset
    metadata.storage_data[type(index)("params.a")] = info
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def poison_a_tensor(folder: Path, payload: Payload) -> None:
    metadata = read_metadata(folder)
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == "params.a")
    file = folder / info.relative_path
    info.offset = file.stat().st_size
    with file.open("ab") as end:
        torch.save(payload, end)
        info.length = end.tell() - info.offset
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def read_metadata(folder: Path) -> Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())


@pytest.mark.parametrize(
    "poison, is_live",
    [
        (poison_metadata, True),
        (poison_within_metadata, True),
        (poison_a_dotted_name, True),
        (poison_an_object, True),
        (poison_a_tensor, False),
    ],
)
def test_nothing_in_a_checkpoint_is_executed(
    tmp_path: Path, poison: Callable[[Path, Payload], None], is_live: bool
) -> None:
    """Though its manifest is right: whoever wrote it knew how. With torch's own reader it is (where it `is_live`)."""
    folder, marker = tmp_path / "step-00000001", tmp_path / "executed"
    state = TrainState({"a": torch.randn(30, 20), "b": torch.randn(3)}, {}, 1, 8)
    checkpoint.save(tmp_path, state, {}, is_main=True)
    poison(folder, Payload(marker))
    (folder / checkpoint.MANIFEST).unlink()
    durable.write_manifest(folder, {"step": 1, "samples": 8}, durable.hash_files(folder.iterdir()))

    assert checkpoint.newest(tmp_path) == folder
    for reader in (
        lambda: checkpoint.restore(folder, TrainState(zeros(state.params), {})),
        lambda: checkpoint.load_params(folder, zeros(state.params)),
    ):
        with pytest.raises(ValueError, match=rf"{folder} ") as raised:
            reader()
        assert "\n" not in str(raised.value)
    assert not marker.exists()

    with pytest.raises(BaseException):  # noqa: B017 - what comes of it does not matter
        dcp.load({"params": zeros(state.params)}, checkpoint_id=folder)
        raise ValueError
    assert marker.exists() == is_live


def test_metadata_that_the_manifest_does_not_know_are_not_unpickled(tmp_path: Path, params: Tensors) -> None:
    files = write(tmp_path, params)
    poison_metadata(tmp_path, Payload(tmp_path / "executed"))
    with pytest.raises(ValueError, match="is not what was saved"):
        shards.Reader(tmp_path, files)
    assert not (tmp_path / "executed").exists()


def test_metadata_lead_to_no_other_file(tmp_path: Path, params: Tensors) -> None:
    write(tmp_path, params)
    metadata = read_metadata(tmp_path)
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="names the file ../elsewhere, which the manifest does not"):
        shards.Reader(tmp_path, durable.hash_files(tmp_path.iterdir()))
