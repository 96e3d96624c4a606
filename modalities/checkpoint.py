"""Checkpoints: save, verify, find, restore. A directory without a valid manifest does not exist.

`step-N.tmp/` is written and fsynced, given its manifest, and renamed. A checkpoint is never overwritten. The tensors
are in the format of torch.distributed.checkpoint, so one that N ranks wrote loads on any number.
"""

import hashlib
import json
import re
import shutil
import sys
import time
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from modalities.dist import barrier, broadcast_from_main
from modalities.optim import Params
from modalities.pbin import fsync
from modalities.step import TrainState

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved."""

    every: int = 1000
    """Steps between two checkpoints; 0: at the end alone."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"checkpoint.every is {self.every}, but must not be negative")


def save(run: Path, state: TrainState, recipe: dict[str, Any], is_main: bool) -> Path:
    """Write `run/step-N` from all ranks and return it; a valid one that lies there already is left as it is."""
    path = run / f"step-{state.step:08}"
    part = path.with_suffix(".tmp")
    if broadcast_from_main(is_main and valid_or_aside(path)):
        return path
    if is_main:
        shutil.rmtree(part, ignore_errors=True)  # what a killed run left half-written
        part.mkdir(parents=True)
    barrier()
    with one_line(f"{path} cannot be written ({{why}}); is the disk full?") as dcp:
        dcp.save({"params": state.params, "opt_state": state.opt_state}, checkpoint_id=part, no_dist=not distributed())
    barrier()
    if is_main:
        (part / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
        write_manifest(part, state)
        part.rename(path)
        fsync(run)
    barrier()
    return path


def valid_or_aside(path: Path) -> bool:
    """Whether a valid checkpoint lies at `path`; a damaged one is renamed, so that its place is free."""
    if not path.exists():
        return False
    try:
        read_manifest(path)
    except ValueError:
        path.rename(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))
        return False
    return True


def write_manifest(folder: Path, state: TrainState) -> None:
    """Hash and fsync every file of `folder`, then write their list, and the position of the run, last."""
    files = {}
    for file in sorted(folder.iterdir()):
        files[file.name] = {"size": file.stat().st_size, "sha256": sha256(file)}
        fsync(file)
    manifest = {"step": state.step, "samples": state.samples, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    fsync(folder / MANIFEST)
    fsync(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file has the size and hash that it states, or a ValueError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        step, _ = int(manifest["step"]), int(manifest["samples"])
        files = [(folder / name, facts["size"], facts["sha256"]) for name, facts in manifest["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is no checkpoint: its {MANIFEST} is missing or broken ({error!r})") from None
    if re.fullmatch(r"step-\d+", folder.name) and int(folder.name[5:]) != step:
        raise ValueError(f"{folder} is damaged: its {MANIFEST} is of step {step}")
    for file, size, digest in files:
        if not file.is_file() or file.stat().st_size != size or sha256(file) != digest:
            raise ValueError(f"{folder} is damaged: {file.name} is missing or not what was saved")
    return manifest


def newest(run: Path) -> Path | None:
    """The valid checkpoint of the highest step in a run's folder, or None; damaged ones are passed over loudly."""
    steps = [path for path in run.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    for path in sorted(steps, key=lambda path: int(path.name[5:]), reverse=True):
        try:
            read_manifest(path)
        except ValueError as error:
            print(f"warning: {error}; passing over it", file=sys.stderr)
        else:
            return path
    return None


def restore(path: Path, state: TrainState) -> TrainState:
    """Load a verified checkpoint into the tensors of `state` (names, shapes, sharding); all ranks together.

    `ValueError` where it is of another model, or holds weights alone.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    problem = f"{path} is no checkpoint of this run ({{why}}); to start another run from its weights give --model-from"
    with one_line(problem) as dcp:
        whole = {"params": state.params, "opt_state": state.opt_state}
        dcp.load(whole, checkpoint_id=path, no_dist=not distributed())
    return TrainState(state.params, state.opt_state, manifest["step"], manifest["samples"])


def load_params(path: Path, params: Params) -> Params:
    """Load the weights alone of a verified checkpoint into `params`; `ValueError` where it is of another model."""
    with one_line(f"the weights of {path} cannot be read ({{why}})") as dcp:
        dcp.load({"params": params}, checkpoint_id=path, no_dist=not distributed())
    return params


def distributed() -> bool:
    return torch.distributed.is_initialized()


@contextmanager
def one_line(problem: str) -> Iterator[types.ModuleType]:
    """torch.distributed.checkpoint for a call of it, without its remarks about a single process, which is meant.

    What fails in it on any rank is a ValueError on all: `problem`, in which {why} is the first cause.
    """
    # Here and not above, for it takes long to load, and a run would rather take its first step.
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            yield dcp
    except CheckpointException as error:  # no Exception, so nobody else would catch it
        why = next(iter(error.failures.values()))[0]
        if isinstance(why, KeyboardInterrupt):
            raise why from None
        # Of a full disk torch's writer says no more than "unexpected pos", but that came of an OSError.
        if isinstance(why.__context__, OSError):
            why = why.__context__
        raise ValueError(problem.replace("{why}", " ".join(str(why).split()))) from None


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
