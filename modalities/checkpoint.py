"""Checkpoints: save, verify, find, restore. A directory without a valid manifest does not exist.

`step-N.tmp/` is written and fsynced, given its manifest, and renamed. A checkpoint is never overwritten. The tensors
are in the format of torch.distributed.checkpoint, so one that N ranks wrote loads on any number.
"""

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from modalities import durable, ema, ranks
from modalities.dist import all_or_none, broadcast_from_main, gather_objects
from modalities.durable import read_manifest
from modalities.optim import Params, local
from modalities.step import TrainState

MANIFEST = durable.MANIFEST


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, and which checkpoints stay."""

    every: int = 1000
    """Steps between two checkpoints; 0: at the end alone."""
    every_minutes: float = 0.0
    """Minutes after which the state is saved at the latest [min]; 0: whatever the time."""
    keep_last: int = 0
    """The newest so many stay; 0: all."""
    keep_every: int = 0
    """Checkpoints of steps that this divides stay as well; 0: none."""
    keep_best: int = 0
    """So many of the lowest loss, the mean over the validation sets, stay as well; 0: none. It is the loss of the
    weights themselves, also where a running mean of them (`ema`) is evaluated beside them."""
    background: bool = True
    """Write while training goes on, from a copy of the state in the host's memory."""
    max_failures: int = 3
    """Saves in a row that may fail; then the run stops."""

    def __post_init__(self) -> None:
        for name in ("every", "every_minutes", "keep_last", "keep_every", "keep_best"):
            if not getattr(self, name) >= 0:  # nor NaN
                raise ValueError(f"checkpoint.{name} is {getattr(self, name)}, but must not be negative")
        if (self.keep_every or self.keep_best) and not self.keep_last:
            raise ValueError(
                "checkpoint.keep_last is 0, which keeps all; give it too for keep_every or keep_best to matter"
            )
        if self.max_failures < 1:
            raise ValueError(f"checkpoint.max_failures is {self.max_failures}, but must be at least 1")


def path_of(run: Path, step: int) -> Path:
    return run / f"step-{step:08}"


def save(
    run: Path,
    state: TrainState,
    recipe: dict[str, Any],
    is_main: bool,
    facts: Mapping[str, Any] | None = None,
    parts: Mapping[str, Tensor] | None = None,
    group: ProcessGroup | None = None,
) -> Path:
    """Write `run/step-N` from all ranks and return it; a valid one that lies there already is left as it is.

    `facts`: what the manifest is to hold beside step and samples, as JSON. `parts`: as `parts_of` gives them, a copy,
    say; None: the state's own. `group`: all ranks, by another way than that of training, should that go on meanwhile.
    A ValueError on all ranks, and nothing left behind, where it fails on any.
    """
    from modalities import shards  # not above: it loads slowly, and a run would rather take its first step

    path = path_of(run, state.step)
    part = path.with_suffix(".tmp")
    with one_line(f"{path} cannot be written ({{why}}); is the disk full?"):
        with all_or_none(group):
            exists = is_main and valid_or_aside(path)
            if is_main and not exists:
                shutil.rmtree(part, ignore_errors=True)  # what a killed run left half-written
                part.mkdir(parents=True)
        if broadcast_from_main(exists, group):
            return path
        try:
            tensors = {"params": state.params, "opt_state": state.opt_state} | ({"ema": state.ema} if state.ema else {})
            written = shards.write(part, tensors, parts or parts_of(state), group)
            every = gather_objects(written, group)
            with all_or_none(group):
                if is_main:
                    text = json.dumps(recipe, indent=2) + "\n"
                    files = {"recipe.json": durable.write_file(part / "recipe.json", text.encode())}
                    small = {
                        kind: {name: value.tolist() for name, value in values.items()}
                        for kind, values in (("guard", state.guard), ("noise", state.noise))
                    }
                    known = {"step": state.step, "samples": state.samples, **(facts or {}), **small}
                    durable.finish(part, path, known, files | {k: v for rank in every for k, v in rank.items()})
        except BaseException:
            if is_main:
                shutil.rmtree(part, ignore_errors=True)
            raise
    return path


def parts_of(state: TrainState) -> dict[str, Tensor]:
    """This rank's part of each tensor that a checkpoint holds, by its name there."""
    parts = {f"params.{name}": local(param) for name, param in state.params.items()}
    for kind, tensors in state.opt_state.items():
        parts |= {f"opt_state.{kind}.{name}": local(tensor) for name, tensor in tensors.items()}
    return parts | {f"ema.{name}": local(tensor) for name, tensor in state.ema.items()}


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


def steps(run: Path) -> list[Path]:
    """What looks like a checkpoint in a run's folder, the highest step first."""
    paths = [path for path in run.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(paths, key=lambda path: int(path.name[5:]), reverse=True)


def newest(run: Path) -> Path | None:
    """The valid checkpoint of the highest step in a run's folder, or None; damaged ones are passed over loudly."""
    for path in steps(run):
        try:
            read_manifest(path)
        except ValueError as error:
            print(f"warning: {error}; passing over it", file=sys.stderr)
        else:
            return path
    return None


def restore(path: Path, state: TrainState) -> TrainState:
    """Load a verified checkpoint into the tensors of `state` (names, shapes, sharding); all ranks together.

    Where it has no running mean of the weights, the mean begins with them. `ValueError` where it is of another model,
    or holds weights alone.
    """
    problem = f"{path} is no checkpoint of this run ({{why}}); to start another run from its weights give --model-from"
    tensors = {"params": state.params, "opt_state": state.opt_state, "ema": state.ema}
    manifest = read(path, tensors, problem, optional=("ema",))
    if "ema" not in tensors:
        ema.restart(state.ema, state.params)
    guard, noise = (
        {name: torch.tensor(value, dtype=torch.float64) for name, value in manifest.get(kind, {}).items()}
        for kind in ("guard", "noise")
    )
    return TrainState(state.params, state.opt_state, manifest["step"], manifest["samples"], guard, state.ema, noise)


def load_params(path: Path, params: Params, kind: str = "params") -> Params:
    """Load the weights alone of a verified checkpoint into `params`; `ValueError` where it is of another model.

    `kind`: "ema" for their running mean, which it must have.
    """
    read(path, {kind: params}, f"the weights of {path} cannot be read ({{why}})")
    return params


def has_ema(path: Path) -> bool:
    """Whether a verified checkpoint has a running mean of the weights."""
    from modalities import shards

    with one_line(f"{path} cannot be read ({{why}})"):
        return shards.Reader(path, durable.read_facts(path)["files"]).has("ema")


def read(path: Path, tensors: dict[str, Any], problem: str, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read the `tensors` of a checkpoint in place; returns its manifest. `problem` is what a ValueError says.

    The `optional` kinds that it lacks are taken out of `tensors`.
    """
    from modalities import shards

    with one_line(problem), all_or_none():
        manifest = durable.read_facts(path)
        reader = shards.Reader(path, manifest["files"])
        for kind in optional:
            if not reader.has(kind):
                del tensors[kind]
        shards.read(reader, tensors)
    return manifest


@contextmanager
def one_line(problem: str) -> Iterator[None]:
    """What fails is told by `problem`, in which {why} is the cause: a ValueError, or what may work again."""
    try:
        yield
    except (ValueError, OSError) as error:
        line = problem.replace("{why}", " ".join(str(error).split()))
        raise ranks.error_of(ranks.status_of(error), line) from None
