"""Checkpoints: what is restored is what was saved, to the bit, on any number of ranks; damage is noticed."""

import json
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest
import tiny
import torch

from modalities import checkpoint, dist, loop
from modalities.config import to_dict
from modalities.optim import local
from modalities.step import TrainState


def trained(folder: Path, world: dist.World, steps: int) -> TrainState:
    """A state whose moments are not zero."""
    run, state = loop.build(tiny.recipe(folder), world)
    for _ in range(steps):
        state, _ = run.train_step(state, run.data.batch(state.samples))
    return state


def tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """Every tensor of a state, whole."""
    named = {f"params.{name}": p for name, p in state.params.items()}
    for kind, moments in state.opt_state.items():
        named |= {f"{kind}.{name}": moment for name, moment in moments.items()}
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in named.items()}


def save_on_ranks(folder: Path) -> None:
    with dist.setup() as world:
        state = trained(folder, world, 2)
        checkpoint.save(folder / "run", state, to_dict(tiny.recipe(folder)), world.is_main)
        whole = tensors(state)
        if world.is_main:
            torch.save(whole, folder / "expected.pt")


def load_on_ranks(folder: Path) -> None:
    with dist.setup() as world:
        _, state = loop.build(tiny.recipe(folder), world)
        newest = checkpoint.newest(folder / "run")
        assert newest is not None
        state = checkpoint.restore(newest, state)
        assert (state.step, state.samples) == (2, 16)
        expected = torch.load(folder / "expected.pt")
        found = tensors(state)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("saving, loading", [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3)])
def test_restored_to_the_bit_on_any_number_of_ranks(tmp_path: Path, saving: int, loading: int) -> None:
    tiny.recipe(tmp_path)  # writes the data once, before the ranks would race for it
    for ranks, function in ((saving, save_on_ranks), (loading, load_on_ranks)):
        if ranks == 1:
            function(tmp_path)
        else:
            tiny.run_ranks(ranks, function, tmp_path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run's folder with the checkpoints of steps 1 and 2."""
    with dist.setup() as world:
        run, state = loop.build(tiny.recipe(tmp_path), world)
        for _ in range(2):
            state, _ = run.train_step(state, run.data.batch(state.samples))
            checkpoint.save(tmp_path / "run", state, to_dict(tiny.recipe(tmp_path)), is_main=True)
    return tmp_path / "run"


def test_a_checkpoint_holds_what_the_design_says(saved: Path) -> None:
    folder = saved / "step-00000002"
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == files >= {".metadata", "recipe.json"}
    assert any(name.endswith(".distcp") for name in files)
    assert not list(saved.glob("*.tmp"))


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", ["bit", "truncated", "missing", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over(saved: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    newest = saved / "step-00000002"
    shard = next(newest.glob("*.distcp"))
    match damage:
        case "bit":
            flip_a_bit(shard)
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-1])
        case "missing":
            shard.unlink()
        case "manifest":
            (newest / "manifest.json").write_text('{"files": 3')
        case "no manifest":
            (newest / "manifest.json").unlink()
    with pytest.raises(ValueError, match="step-00000002"):
        checkpoint.read_manifest(newest)
    assert checkpoint.newest(saved) == saved / "step-00000001"
    assert "step-00000002" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_put_aside_and_saved_again(saved: Path, tmp_path: Path) -> None:
    newest = saved / "step-00000002"
    flip_a_bit(next(newest.glob("*.distcp")))
    with dist.setup() as world:
        run, state = loop.build(tiny.recipe(tmp_path), world)
        state = checkpoint.restore(saved / "step-00000001", state)
        state, _ = run.train_step(state, run.data.batch(state.samples))
        assert checkpoint.save(saved, state, to_dict(tiny.recipe(tmp_path)), is_main=True) == newest
    assert checkpoint.newest(saved) == newest
    assert len(list(saved.glob("step-00000002.damaged-*"))) == 1


def test_a_checkpoint_under_another_name_is_not_valid(saved: Path) -> None:
    (saved / "step-00000002").rename(saved / "step-00000009")
    assert checkpoint.newest(saved) == saved / "step-00000001"


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"step": 2, "samples": 16, "files": {"x": 3}}', "null"])
def test_a_manifest_of_another_shape_is_damage(saved: Path, manifest: str) -> None:
    (saved / "step-00000002" / "manifest.json").write_text(manifest)
    assert checkpoint.newest(saved) == saved / "step-00000001"


def test_nothing_half_written_counts(saved: Path) -> None:
    (saved / "step-00000002").rename(saved / "step-00000002.tmp")
    assert checkpoint.newest(saved) == saved / "step-00000001"
    shutil.rmtree(saved / "step-00000001")
    assert checkpoint.newest(saved) is None


def test_a_checkpoint_is_never_overwritten(saved: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (saved / "step-00000002").iterdir()}
    with dist.setup() as world:
        _, other = loop.build(tiny.recipe(tmp_path, seed=1), world)
        other = TrainState(other.params, other.opt_state, step=2, samples=16)
        checkpoint.save(saved, other, to_dict(tiny.recipe(tmp_path, seed=1)), is_main=True)
    assert before == {path: path.read_bytes() for path in (saved / "step-00000002").iterdir()}


def test_what_a_killed_save_left_is_no_obstacle(saved: Path, tmp_path: Path) -> None:
    part = saved / "step-00000003.tmp"
    part.mkdir()
    (part / "__0_0.distcp").write_text("half")
    (part / "stray").write_text("of an older world")
    with dist.setup() as world:
        run, state = loop.build(tiny.recipe(tmp_path), world)
        state = checkpoint.restore(saved / "step-00000002", state)
        state, _ = run.train_step(state, run.data.batch(state.samples))
        path = checkpoint.save(saved, state, to_dict(tiny.recipe(tmp_path)), is_main=True)
    assert checkpoint.newest(saved) == path and not (path / "stray").exists()
    assert all(local(p).isfinite().all() for p in state.params.values())


def test_weights_alone_are_nothing_to_continue(tmp_path: Path) -> None:
    with dist.setup() as world:
        state = trained(tmp_path, world, 1)
        path = checkpoint.save(tmp_path / "run", TrainState(state.params, {}), {}, True)
        with pytest.raises(ValueError, match=r"step-00000000 is no checkpoint of this run \(.*--model-from") as caught:
            checkpoint.restore(path, state)
        assert "\n" not in str(caught.value)


def test_weights_that_are_not_there_end_in_one_line(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"^the weights of .*step-00000002 cannot be read \(.*extra.*\)$"):
        checkpoint.load_params(saved / "step-00000002", {"extra": torch.empty(3)})


def save_on_a_full_disk(folder: Path) -> None:
    with dist.setup() as world:
        state = trained(folder, world, 1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with pytest.raises(ValueError) as caught:
            checkpoint.save(folder / "run", state, {}, world.is_main)
        why = r"\[Errno 27\] File too large"
        assert re.fullmatch(rf".*step-00000001 cannot be written \({why}\); is the disk full\?", str(caught.value))


def test_a_full_disk_ends_in_one_line_on_all_ranks(tmp_path: Path) -> None:
    tiny.recipe(tmp_path)
    tiny.run_ranks(2, save_on_a_full_disk, tmp_path)
    assert not list((tmp_path / "run").iterdir())
