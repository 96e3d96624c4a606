"""Saves in the background, what stays of them, and what becomes of a run whose saves fail."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from modalities import checkpoint, dist, durable, loop, saving
from modalities.checkpoint import CheckpointConfig
from modalities.config import to_dict
from modalities.optim import local
from modalities.step import TrainState

ONE = dist.World(0, 1, torch.device("cpu"), None)


def state(step: int, size: int = 100) -> TrainState:
    """Of tensors that are all filled with its step."""
    params = {name: torch.full((size,), float(step)) for name in "ab"}
    return TrainState(params, {"exp_avg": {name: p.clone() for name, p in params.items()}}, step, 8 * step)


def value(path: Path, size: int = 100) -> float:
    """What all tensors of such a checkpoint hold."""
    restored = checkpoint.restore(path, state(-1, size))
    values = torch.cat([*restored.params.values(), *restored.opt_state["exp_avg"].values()]).unique()
    assert len(values) == 1
    return values.item()


@contextlib.contextmanager
def saver(run: Path, said: list[str] | None = None, **config: Any) -> Iterator[saving.Saver]:
    facts = {"recipe": {"name": "x"}, "fingerprints": {"tokenizer": "00ff"}}
    said = [] if said is None else said
    with saving.saver(CheckpointConfig(**config), run, ONE, facts, said.append) as made:
        yield made


@contextlib.contextmanager
def full_disk(free: int = 1000) -> Iterator[None]:
    """No file can grow beyond so many bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in checkpoint.steps(run))


@pytest.mark.parametrize("background", [True, False])
def test_what_is_saved_is_the_state_of_its_step(tmp_path: Path, background: bool) -> None:
    size = 1_000_000
    live = state(0, size)
    with saver(tmp_path, background=background) as saves:
        for step in range(1, 5):
            for tensors in (live.params, live.opt_state["exp_avg"]):
                for tensor in tensors.values():
                    tensor.fill_(step)
            saves.save(replace(live, step=step, samples=8 * step))
    # Were they written from the live tensors, they would hold what was filled in meanwhile.
    assert [value(path, size) for path in reversed(checkpoint.steps(tmp_path))] == [1, 2, 3, 4]


def test_saved_is_said_when_it_is_durable(tmp_path: Path) -> None:
    seen = []

    def say(text: str) -> None:
        seen.append((text, durable.read_manifest(tmp_path / "step-00000001")["step"]))

    with saving.saver(CheckpointConfig(), tmp_path, ONE, {"recipe": {}}, say) as saves:
        saves.save(state(1, 10**6))
        assert not seen  # training goes on before it is
    assert seen == [(f"step 1: saved {tmp_path / 'step-00000001'}", 1)]
    assert saves.latest == tmp_path / "step-00000001"


def test_a_manifest_holds_what_is_known(tmp_path: Path) -> None:
    with saver(tmp_path) as saves:
        one = replace(state(1), guard={"losses": torch.tensor([1.5, 0.1]), "bad": torch.tensor(3)})
        saves.save(one, {"docs": torch.tensor(2.5), "code": float("nan")})
    path = tmp_path / "step-00000001"
    manifest = durable.read_manifest(path)
    assert manifest["val"] == {"docs": 2.5, "code": None} and manifest["fingerprints"] == {"tokenizer": "00ff"}
    guard = checkpoint.restore(path, state(-1)).guard
    assert torch.equal(guard["losses"], torch.tensor([1.5, 0.1]).double()) and guard["bad"] == 3
    assert json.loads((path / "recipe.json").read_text()) == {"name": "x"}


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    said: list[str] = []
    with saver(tmp_path, said) as saves:
        saves.save(state(1))
        saves.save(state(1), now=True)
    assert len(said) == 1


def test_steps_minutes_and_the_end(tmp_path: Path) -> None:
    with saver(tmp_path, every=3, every_minutes=0.005) as saves:
        assert [step for step in range(1, 9) if saves.due(step, 8)] == [3, 6, 8]
        assert not saves.overdue()
        time.sleep(0.4)
        assert saves.overdue()
        assert not saves.overdue()  # for the ranks have yet to agree on what was said
        saves.save(state(1))
        assert not saves.overdue()
        time.sleep(0.4)
        assert saves.overdue()
    with saver(tmp_path, every=0) as saves:
        assert [step for step in range(1, 9) if saves.due(step, 8)] == [8] and not saves.overdue()


@pytest.mark.parametrize("background", [True, False])
def test_a_save_that_fails_is_tried_again(tmp_path: Path, background: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with saver(tmp_path, background=background, max_failures=3) as saves:
        saves.save(state(1))
        saves.wait()
        for step in (2, 3):
            with full_disk():
                saves.save(state(step))
                saves.wait()
            assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        saves.save(state(4))
        saves.wait()
        assert saves.failures == 0 and steps(tmp_path) == [1, 4]
    warnings = capsys.readouterr().err.splitlines()
    assert [f"step-0000000{step}" in line for step, line in zip((2, 3), warnings, strict=True)] == [True, True]
    assert "[Errno 27] File too large" in warnings[0]


@pytest.mark.parametrize("background", [True, False])
def test_too_many_failures_end_the_run(tmp_path: Path, background: bool) -> None:
    with (
        pytest.raises(
            ValueError, match=r"^2 times in a row: .*step-00000003 cannot be written \(\[Errno 27\]"
        ) as raised,
        saver(tmp_path, background=background, max_failures=2) as saves,
    ):
        saves.save(state(1))
        saves.wait()
        with full_disk():
            saves.save(state(2))
            saves.save(state(3))
            while not saves.overdue():  # at the next boundary the ranks are called together, whatever the interval
                time.sleep(0.01)
        saves.save(state(4))
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"] and value(tmp_path / "step-00000001") == 1


def test_a_last_save_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step-00000002 cannot be written"), saver(tmp_path) as saves:
        saves.save(state(1), now=True)
        with full_disk():
            saves.save(state(2), now=True)
    assert steps(tmp_path) == [1] and value(tmp_path / "step-00000001") == 1


def test_what_is_being_written_when_a_run_fails_is_still_finished(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), saver(tmp_path) as saves:
        saves.save(state(1, 10**6))
        raise ZeroDivisionError
    assert value(tmp_path / "step-00000001", 10**6) == 1


# ------------------------------------------------------------------------------------------------------- what stays


def save_all(run: Path, losses: Mapping[int, float | None], **config: Any) -> None:
    """A checkpoint of each step, with its loss where it has one."""
    with saver(run, **config) as saves:
        for step, loss in losses.items():
            saves.save(state(step), {} if loss is None else {"a": loss, "b": loss + 1})


def test_what_retention_keeps(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 1.0, 3: None, 4: 2.0, 5: 7.0, 6: float("nan"), 7: 6.0, 8: 3.0}
    save_all(tmp_path / "all", losses)
    assert steps(tmp_path / "all") == list(losses)
    save_all(tmp_path / "last", losses, keep_last=2)
    assert steps(tmp_path / "last") == [7, 8]
    save_all(tmp_path / "every", losses, keep_last=1, keep_every=3)
    assert steps(tmp_path / "every") == [3, 6, 8]
    save_all(tmp_path / "best", losses, keep_last=1, keep_best=2)
    assert steps(tmp_path / "best") == [2, 4, 8]
    assert not list(tmp_path.glob("*/*.tmp"))
    assert all(value(path) == int(path.name[5:]) for run in tmp_path.iterdir() for path in checkpoint.steps(run))


def test_retention_alone_would_do_nothing() -> None:
    with pytest.raises(ValueError, match=r"checkpoint.keep_last is 0, which keeps all"):
        CheckpointConfig(keep_best=2)


def flip_a_bit(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_what_is_damaged_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 1 to 5, with the wrong sizes or the wrong hashes in 2, 4 and 5, a run that keeps three keeps 1, 3 and 6."""
    save_all(tmp_path, dict.fromkeys(range(1, 6)))
    flip_a_bit(tmp_path / "step-00000005")
    (tmp_path / "step-00000004" / "recipe.json").unlink()
    flip_a_bit(tmp_path / "step-00000002")
    save_all(tmp_path, {6: None}, keep_last=3)
    left = {
        step: checkpoint.newest(path.parent) for step in (1, 3, 6) if (path := tmp_path / f"step-{step:08}").exists()
    }
    assert list(left) == [1, 3, 6]
    assert "step-00000005 is damaged" in capsys.readouterr().err


def test_the_last_valid_checkpoint_stays(tmp_path: Path) -> None:
    """The newest was right when it was written, and is damaged by the time that the others would go."""
    save_all(tmp_path, dict.fromkeys(range(1, 4)))
    checked = {path: True for path in checkpoint.steps(tmp_path)}
    flip_a_bit(tmp_path / "step-00000003")
    saving.prune(tmp_path, CheckpointConfig(keep_last=1), checked)
    assert steps(tmp_path) == [1, 2, 3] and checkpoint.newest(tmp_path) == tmp_path / "step-00000002"
    saving.prune(tmp_path, CheckpointConfig(keep_last=1), checked)
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000002" and steps(tmp_path) == [2, 3]


def test_partial_saves_do_not_count(tmp_path: Path) -> None:
    save_all(tmp_path, {1: None}, keep_last=1)
    for step in range(2, 7):
        part = tmp_path / f"step-{step:08}{'.tmp' if step % 2 else ''}"
        part.mkdir()
        (part / "__0_0.distcp").write_bytes(b"half")
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000001"
    saving.prune(tmp_path, CheckpointConfig(keep_last=1), {})
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000001"
    save_all(tmp_path, {7: None}, keep_last=1)
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000007"
    assert not list(tmp_path.glob("*.tmp"))


# ------------------------------------------------------------------------------------------------- kills, ranks, runs

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from test_saving import saver, state, steps, value
from modalities import checkpoint

torch.set_num_threads(1)
run, chance, size = Path(sys.argv[1]), random.Random(0), 300_000
begun = 0
for kill in range(12):
    child = os.fork()
    if not child:
        live = state(begun, size)
        with saver(run, background=kill % 2 == 0, keep_last=2) as saves:
            while True:
                live.step += 1
                for tensor in (*live.params.values(), *live.opt_state["exp_avg"].values()):
                    tensor.fill_(live.step)
                saves.save(live)
    while max(steps(run), default=0) <= begun:
        time.sleep(0.005)
    time.sleep(chance.uniform(0, 0.1))  # somewhere in the next saves and deletions
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    newest = checkpoint.newest(run)
    assert newest and value(newest, size) == int(newest.name[5:]) > begun
    begun = int(newest.name[5:])
assert len(steps(run)) <= 3, steps(run)
print(begun)
"""


def test_a_kill_at_any_moment_leaves_valid_checkpoints(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 12 and "damaged" not in done.stderr


def save_on_ranks(folder: Path) -> None:
    """Two saves in the background of training; two that fail on rank 1 alone; one that is well; then no more luck."""
    recipe = tiny.recipe(folder)
    config = CheckpointConfig(max_failures=3)
    with dist.setup() as world:
        run, now = loop.build(recipe, world)
        seen = {}
        with (
            pytest.raises(ValueError, match=r"^3 times in a row: .*\[Errno 27\] File too large"),
            saving.saver(config, folder / "run", world, {"recipe": to_dict(recipe)}, print) as saves,
        ):
            for step in range(1, 9):
                now, _ = run.train_step(now, run.data.batch(now.samples))
                seen[step] = {name: local(p).clone() for name, p in now.params.items()}
                if step in (3, 4, 6, 7, 8) and world.rank == 1:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
                saves.save(now, {"val": 1.0 / step})
                if step in (3, 4):
                    saves.wait()
                    assert saves.failures == step - 2
                    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                if step == 5:
                    saves.wait()
        assert saves.latest == folder / "run" / "step-00000005"
        _, other = loop.build(recipe, world)
        for step in (1, 2, 5):
            restored = checkpoint.restore(folder / "run" / f"step-{step:08}", other)
            assert all(torch.equal(local(p), seen[step][name]) for name, p in restored.params.items())


def test_ranks_agree_on_what_is_saved(tmp_path: Path) -> None:
    tiny.recipe(tmp_path)
    tiny.run_ranks(2, save_on_ranks, tmp_path)
    assert steps(tmp_path / "run") == [1, 2, 5] and not list((tmp_path / "run").glob("*.tmp"))


def test_a_run_keeps_what_its_recipe_says(tmp_path: Path) -> None:
    """In the background or not, the same checkpoints, whose manifests have the losses of their steps."""
    runs = {}
    for name, background in (("back", True), ("fore", False)):
        config = CheckpointConfig(every=5, keep_last=2, keep_best=1, background=background)
        runs[name] = loop.train(tiny.recipe(tmp_path, name=name, checkpoint=config))
        assert {15, 20} <= set(steps(runs[name])) and len(steps(runs[name])) <= 3
    assert steps(runs["back"]) == steps(runs["fore"])
    for path in checkpoint.steps(runs["back"]):
        back, fore = (durable.read_manifest(runs[name] / path.name) for name in runs)
        shards = [name for name in back["files"] if name.endswith(".distcp")]
        assert shards and all(back["files"][name] == fore["files"][name] for name in shards)
        assert set(back.get("val", {})) == (set() if back["step"] % 10 else {"val"})
