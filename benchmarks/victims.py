"""What faults are done to: real training on forked ranks, and the faults themselves.

A fork of this process has torch loaded already, so that a launch takes a second and not ten. What it runs is
`train.py`, all of it, with real ranks on gloo. It must be forked before this process has threads.
"""

import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from modalities import checkpoint, cli, loop
from modalities.checkpoint import CheckpointConfig
from modalities.config import to_dict
from modalities.data import DataConfig, TrainData
from modalities.fsdp import ParallelConfig
from modalities.generate import SampleConfig
from modalities.log import LogConfig, read_metrics
from modalities.loss import Batch
from modalities.mixture import Stage
from modalities.model import ModelConfig
from modalities.optim import OptimConfig, ScheduleConfig
from modalities.pbin import write_pbin
from modalities.recipe import Recipe, parse
from modalities.step import EvalConfig

ROOT = Path(__file__).parents[1]
VOCAB = 100
LONGEST = 300.0
"""A launch that takes longer [s] hangs."""
PR_SET_PDEATHSIG = 1
Hook = Callable[[int], None]
"""Called with its rank in a new process, before `train.py`."""


def prepare(folder: Path) -> None:
    """A recipe `base.json` in `folder`: two sources, a mask, a ramp, stages, a tokenizer. Its runs lie in `runs/`."""
    rng = np.random.default_rng(0)
    for name, documents, length in (("web", 100, 11), ("chat", 100, 40), ("val", 60, 50)):
        tokens = np.cumsum(rng.integers(1, 4, (documents, length)), axis=1) % VOCAB
        with write_pbin(folder / f"{name}.pbin", VOCAB) as append, write_pbin(folder / f"{name}_mask.pbin", 2) as mask:
            for document in tokens:
                append(document)
                mask((document % 3 > 0).astype(np.int64))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    recipe = Recipe(
        name="base",
        steps=20,
        model=ModelConfig(
            vocab_size=VOCAB, num_layers=2, width=32, num_heads=4, mlp_width=48, max_seq_len=32, resid_dropout=0.1
        ),
        data=DataConfig(
            train=("web.pbin", "chat.pbin"),
            weights=(3, 1),
            stages=(Stage(tokens=32 * 90, weights=(1, 2)),),
            masks=("", "chat_mask.pbin"),
            val=("val.pbin",),
            tokenizer="tokenizer.json",
            sampling="best_fit",
            document_mask=True,
            seq_len=32,
            global_batch=8,
            ramp=((32 * 40, 16),),
        ),
        optim=OptimConfig(lr=1e-2, schedule=ScheduleConfig(warmup=3)),
        parallel=ParallelConfig(micro_batch=2, param_dtype="float32", compile="off"),
        eval=EvalConfig(every=10, samples=4),
        sample=SampleConfig(every=0),
        checkpoint=CheckpointConfig(every=2),
        log=LogConfig(every=1, tensorboard=False),
    )
    (folder / "base.json").write_text(json.dumps(to_dict(recipe)))


def command(name: str, steps: int, *flags: object) -> list[str]:
    """The arguments of `train.py` for a run in `runs/<name>`."""
    return ["--recipe", "base.json", "--name", name, "--steps", f"{steps}", *map(str, flags)]


def load() -> None:
    """Import what training imports on its way, so that no launch does."""
    for name in ("torch._dynamo", "torch._functorch.aot_autograd", "torch.onnx", "tyro", "matplotlib.pyplot", "train"):
        importlib.import_module(name)
    recipe = Recipe(name="x", steps=1, model=ModelConfig(vocab_size=VOCAB, num_layers=1, width=32, num_heads=1))
    parse(recipe, [], "train.py")
    gc.collect()
    gc.freeze()  # or each launch would go through all of that


# --------------------------------------------------------------------------------------------------------------- ranks


class Ranks:
    """The processes of one launch."""

    def __init__(self, folder: Path, count: int, args: list[str], hook: Hook | None = None) -> None:
        """Fork `count` ranks that run `train.py` with `args` in `folder`."""
        self.folder, self.name = folder, args[args.index("--name") + 1]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.pids = [self._fork(rank, count, port, args, hook) for rank in range(count)]
        self.statuses: dict[int, int] = {}

    def _fork(self, rank: int, count: int, port: int, args: list[str], hook: Hook | None) -> int:
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        status = 1
        try:
            os.chdir(self.folder)
            for number, kind in ((1, "out"), (2, "err")):
                os.dup2(os.open(self._file(kind, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{count}", LOCAL_WORLD_SIZE=f"{count}")
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=f"{port}")
            sys.argv[1:] = args
            import train

            if hook is not None:
                hook(rank)
            cli.run(train.main)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _file(self, kind: str, rank: int) -> Path:
        return self.folder / f"{self.name}.{rank}.{kind}"

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank that has not ended."""
        if rank not in self.statuses:
            os.kill(self.pids[rank], number)

    def wait(self, seconds: float = LONGEST) -> list[int]:
        """The exit statuses; a rank that does not end in time is killed, which shows in its own (-9)."""
        deadline = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > deadline:
                for rank in range(len(self.pids)):
                    self.kill(rank)
            time.sleep(0.005)
        return [self.statuses[rank] for rank in range(len(self.pids))]

    def ended(self) -> bool:
        """Whether all have."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)
        return len(self.statuses) == len(self.pids)

    def wait_for_one(self, seconds: float = LONGEST) -> None:
        """Until one has ended; then the others are killed, as `modalities.run` does."""
        deadline = time.monotonic() + seconds
        while not (self.ended() or self.statuses) and time.monotonic() < deadline:
            time.sleep(0.002)
        for rank in range(len(self.pids)):
            self.kill(rank)
        self.wait()

    def until(self, condition: Callable[[], Any], seconds: float = LONGEST) -> bool:
        """Wait for `condition` while they live; whether it came."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.ended() or time.monotonic() > deadline:
                return False
            time.sleep(0.001)
        return True

    def out(self) -> str:
        return self._said("out")

    def err(self) -> str:
        return self._said("err")

    def _said(self, kind: str) -> str:
        files = [self._file(kind, rank) for rank in range(len(self.pids))]
        return "".join(file.read_text() for file in files if file.exists())  # a rank makes its own


def trained(folder: Path, count: int, args: list[str], hook: Hook | None = None) -> Ranks:
    """A launch that must succeed."""
    ranks = Ranks(folder, count, args, hook)
    statuses = ranks.wait()
    assert not any(statuses), f"{statuses}: {ranks.err()}"
    return ranks


# ---------------------------------------------------------------------------------------------------------------- state


def state_at(checkpoint_folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read with PyTorch's own reader."""
    metadata = dcp.FileSystemReader(checkpoint_folder).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in metadata.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=checkpoint_folder, no_dist=True)
    return state


def same(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same bits."""
    first, second = state_at(a), state_at(b)
    return len(first) > 20 and first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def newest(run: Path) -> Path | None:
    """As a run that is continued finds it, without its warnings."""
    with contextlib.redirect_stderr(io.StringIO()):
        return checkpoint.newest(run)


def step_of(path: Path | None) -> int:
    return int(path.name[5:]) if path else 0


def steps_logged(run: Path) -> int:
    """The last step in a run's log that has a loss; 0 for none."""
    if not (run / "metrics.jsonl").exists():
        return 0
    return int(max((line["step"] for line in read_metrics(run) if "loss" in line), default=0))


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run) if "loss" in line]


# ---------------------------------------------------------------------------------------------------------------- hooks


def die_at(number: int, victim: int, operations: Path) -> Hook:
    """Rank `victim` kills itself before the `number`-th thing that it does to a checkpoint's files; 0: never.

    Counted are: open to write, mkdir, rename, remove, rmdir and fsync, in a `step-*` folder; they are listed in the
    file `operations`.
    """

    def hook(rank: int) -> None:
        if rank != victim:
            return
        log = os.open(operations, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        done = 0

        def count(name: str, path: object) -> None:
            nonlocal done
            done += 1
            os.write(log, f"{name} {path}\n".encode())
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(event: str, args: tuple) -> None:
            if event == "open":
                path, _, flags = args
                if isinstance(path, str) and "step-" in path and flags & (os.O_WRONLY | os.O_RDWR):
                    count("open", path)
            elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
                # Of what is removed in a folder that is open, only the name is told.
                inside = event in ("os.remove", "os.rmdir") and args[-1] != -1
                if inside or "step-" in f"{args[0]}":
                    count(event[3:], args[0])

        fsync = os.fsync

        def counted_fsync(file: Any) -> None:
            path = os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")
            if "/runs/" in path and not path.endswith((".jsonl", ".json.tmp")):
                count("fsync", path)
            fsync(file)

        sys.addaudithook(audit)
        # It is no event of Python's; the real one is called all the same.
        os.fsync = counted_fsync  # type: ignore[assignment]

    return hook


def recording(run: str) -> Hook:
    """Each rank writes which sequences it is given to `<run>.<rank>.order`."""

    def hook(rank: int) -> None:
        batch, file = TrainData.batch, Path(f"{run}.{rank}.order").open("w")  # noqa: SIM115  (until the process ends)

        def recorded(self: TrainData, samples: int) -> Batch:
            sources, numbers = (array.tolist() for array in self.order(samples))
            print(json.dumps([samples, [*zip(sources, numbers, strict=True)]]), file=file, flush=True)
            return batch(self, samples)

        TrainData.batch = recorded  # type: ignore[method-assign]

    return hook


def order_of(folder: Path, run: str) -> dict[int, list[list[int]]]:
    """(source, sequence) of all ranks in their order, by how many went before the batch."""
    order: dict[int, list[list[int]]] = {}
    for path in sorted(folder.glob(f"{run}.*.order")):
        for line in path.read_text().splitlines():
            samples, part = json.loads(line)
            order.setdefault(samples, []).extend(part)
    return order


def bad_number(kind: str, where: str, first: int, victim: int) -> Hook:
    """On rank `victim` the loss or the gradient of each step after step `first` is multiplied with `kind`."""

    def hook(rank: int) -> None:
        if rank != victim:
            return
        make_loss_fn, steps = loop.step.make_loss_fn, iter(range(10**9))
        bad = float(kind)

        def make(*args: Any, **options: Any) -> Any:
            loss_fn = make_loss_fn(*args, **options)
            if not options["train"]:
                return loss_fn

            def wrong(params: Any, batch: Batch) -> Any:
                loss, aux = loss_fn(params, batch)
                if next(steps) // MICRO_BATCHES < first:
                    return loss, aux
                if where == "loss":
                    return loss * bad, aux
                loss.register_hook(lambda grad: grad * bad)
                return loss, aux

            return wrong

        loop.step.make_loss_fn = make

    return hook


MICRO_BATCHES = 2
"""Of a rank's step: 8 sequences on 2 ranks, in micro-batches of 2."""


@contextlib.contextmanager
def edited(path: Path) -> Iterator[None]:
    """Whatever the block does to a file is undone."""
    content = path.read_bytes()
    try:
        yield
    finally:
        path.write_bytes(content)


# --------------------------------------------------------------------------------------------------------------- trials


@dataclass(frozen=True)
class Result:
    tried: int
    passed: int
    detail: str


@dataclass
class Trial:
    """What a row is given."""

    folder: Path
    """With the recipe and its data; all runs lie in its `runs/`."""
    quick: bool
    random: random.Random

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def begun(self, name: str, like: str, step: int) -> Path:
        """A run called `name` that is the run `like` up to `step`, with this checkpoint alone."""
        others = [path.name for path in self.run(like).glob("step-*") if step_of(path) != step]
        shutil.rmtree(self.run(name), ignore_errors=True)
        return shutil.copytree(self.run(like), self.run(name), ignore=shutil.ignore_patterns(*others))

    def holds(self, promise: bool, launch: Ranks) -> bool:
        """`promise`; what the launch came to is shown where it does not hold."""
        if not promise:
            print(f"{launch.name} ended with {launch.statuses}:\n{launch.err()}", file=sys.stderr, flush=True)
        return promise

    def straight(self, steps: int = 6) -> Path:
        """A run that nothing happens to, of checkpoints at every step."""
        run = self.run(f"straight-{steps}")
        if not run.exists():
            trained(self.folder, 2, command(run.name, steps, "--checkpoint.every", 1))
        return run


def checkpoint_at(run: Path, step: int) -> Path:
    return run / f"step-{step:08}"
