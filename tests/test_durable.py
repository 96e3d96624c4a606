"""Folders that are whole or not there: all damage to a checkpoint is found, and the one before it is used."""

import errno
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from modalities import checkpoint, durable
from modalities.step import TrainState


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with the checkpoints of steps 1 and 2."""
    run = tmp_path_factory.mktemp("run")
    params = {f"layer{i}.weight": torch.randn(40, 30) for i in range(4)}
    moments = {"exp_avg": {name: torch.randn_like(p) for name, p in params.items()}}
    for step in (1, 2):
        state = TrainState(params, moments, step, 8 * step, {"losses": torch.randn(5)})
        checkpoint.save(run, state, {"name": "x"}, True, {"val": {"a": 3.25}, "fingerprints": {"data/a": "00ff"}})
    return run


@pytest.fixture
def files(two: Path) -> Iterator[list[Path]]:
    """Those of step 2, which are whole again afterwards."""
    content = {path: path.read_bytes() for path in (two / "step-00000002").iterdir()}
    yield sorted(content)
    for path, whole in content.items():
        path.write_bytes(whole)


def is_found(run: Path) -> bool:
    """Whether the damage to step 2 is noticed and step 1 used instead."""
    with pytest.raises(ValueError, match="step-00000002 is") as raised:
        durable.read_manifest(run / "step-00000002")
    assert "\n" not in str(raised.value)
    return checkpoint.newest(run) == run / "step-00000001"


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_any_of_200_flipped_bits_is_found(two: Path, files: list[Path]) -> None:
    chance = random.Random(0)
    for i in range(200):
        path = files[i % len(files)]
        whole = path.read_bytes()
        path.write_bytes(flipped(whole, chance.randrange(8 * len(whole))))
        assert is_found(two), path
        path.write_bytes(whole)
    assert checkpoint.newest(two) == two / "step-00000002"


def test_every_bit_of_a_manifest_matters(two: Path, files: list[Path]) -> None:
    """Each fifth, for speed: the first of one byte, the sixth of it, the third of the next …"""
    path = two / "step-00000002" / checkpoint.MANIFEST
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 5):
        path.write_bytes(flipped(whole, bit))
        with pytest.raises(ValueError, match="step-00000002"):
            durable.read_facts(path.parent)


def test_any_of_50_truncations_is_found(two: Path, files: list[Path]) -> None:
    chance = random.Random(1)
    for i in range(50):
        path = files[i % len(files)]
        whole = path.read_bytes()
        path.write_bytes(whole[: chance.randrange(len(whole))])
        assert is_found(two), path
        path.write_bytes(whole)


def test_a_zeroed_page_or_a_missing_file_is_found(two: Path, files: list[Path]) -> None:
    for path in files:
        whole = path.read_bytes()
        for start in range(0, len(whole), 4096):
            page = whole[start : start + 4096]
            path.write_bytes(whole[:start] + bytes(len(page)) + whole[start + 4096 :])
            assert not any(page) or is_found(two), path
        path.unlink()
        assert is_found(two), path
        path.write_bytes(whole)


def test_another_folder_in_its_place_is_found(two: Path, files: list[Path]) -> None:
    """Its files are whole, and of another step."""
    for path in files:
        path.write_bytes((two / "step-00000001" / path.name).read_bytes())
    assert is_found(two)


def test_a_manifest_from_before_it_had_a_hash_is_valid(two: Path, files: list[Path]) -> None:
    path = two / "step-00000002" / checkpoint.MANIFEST
    manifest = {key: json.loads(path.read_text())[key] for key in ("step", "samples", "files")}
    path.write_text(json.dumps(manifest))
    assert checkpoint.newest(two) == path.parent
    path.write_text(json.dumps(manifest | {"guard": {}}))
    assert is_found(two)


def test_a_manifest_leads_nowhere_else(two: Path, files: list[Path]) -> None:
    folder = two / "step-00000002"
    manifest = durable.read_facts(folder)
    stray = {"../step-00000001/recipe.json": manifest["files"]["recipe.json"]}
    durable.write_manifest(folder, {"step": 2, "samples": 16}, manifest["files"] | stray)
    assert is_found(two)


def test_a_full_disk_is_called_so() -> None:
    with pytest.raises(OSError, match="No space left on device"), durable.hashed(Path("/dev/full")) as file:
        torch.save(torch.zeros(10**6), file)  # type: ignore[arg-type]


def test_a_disk_that_fails_in_the_middle_of_a_file_is_not_believed_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], os.fsync

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.EIO, "of the disk")
        real(descriptor)

    # No disk here fails when it is asked to, and Linux tells a file of a failure once, as this does.
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="of the disk"), durable.hashed(tmp_path / "file") as file:
        file.write(bytes(durable.BYTES_PER_SYNC))


def test_what_is_removed_leaves_nothing_that_looks_like_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "file").write_text("content")
    durable.remove(folder)
    assert not list(tmp_path.iterdir())
    for name in ("step-00000001.tmp", "step-00000002.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("half")
    assert checkpoint.steps(tmp_path) == []
    durable.sweep(tmp_path)
    assert not list(tmp_path.iterdir())
