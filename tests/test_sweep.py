"""Sweeps from the command line to the picture: members together and alone, resumed, refused, drawn."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from modalities import sweep, sweep_results, variants
from modalities.config import to_dict
from modalities.recipe import Recipe, load


@pytest.fixture
def tiny_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The tiny recipe as `tiny.json` in the working directory."""
    monkeypatch.chdir(tmp_path)  # sweeps lie in the working directory
    recipe = tiny.recipe(tmp_path, steps=6)
    recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, every=3))
    (tmp_path / "tiny.json").write_text(json.dumps(to_dict(recipe)))
    return recipe


def run(*args: str) -> dict[int, sweep_results.Result]:
    sweep.main(["--recipe", "tiny.json", *args])
    return sweep_results.read(Path("sweeps/tiny"))


def comparable(results: dict[int, sweep_results.Result]) -> list[sweep_results.Result]:
    return [replace(result, seconds=0.0) for _, result in sorted(results.items())]


def test_a_mixed_sweep_leaves_all_that_it_promises(tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    results = run("--grid", "optim.lr=1e-3,1e-2", "--grid", "model.mlp_width=48,64", "--optim.weight-decay", "0.0")
    assert [result.overrides for result in results.values()] == [
        {"optim.lr": lr, "model.mlp_width": width} for width in (48, 64) for lr in (1e-3, 1e-2)
    ]
    assert {result.together for result in results.values()} == {2}
    results |= run("--grid", "optim.kind=adamw,muon", "--steps", "2", "--dir", "alone") and sweep_results.read(
        Path("alone/tiny")
    )
    assert {results[i].together for i in (0, 1)} == {1}
    table = capsys.readouterr().out
    assert "optim.lr" in table and "val/val" in table and "best" in table
    assert Path("sweeps/tiny/sweep.png").read_bytes().startswith(b"\x89PNG")
    # The best member's recipe is the member's.
    best, _ = load("sweeps/tiny/best.py")
    winner = min(sweep_results.read(Path("sweeps/tiny")).values(), key=lambda result: result.score)
    expected = variants.vary(tiny_recipe, {**winner.overrides, "optim.weight_decay": 0.0})
    assert best == replace(expected, name="tiny-best")


def test_alone_and_together_are_the_same(tiny_recipe: Recipe) -> None:
    grid = ("--grid", "optim.lr=1e-3,1e-2")
    together = run(*grid)
    run(*grid, "--together", "1", "--dir", "alone")
    alone = sweep_results.read(Path("alone/tiny"))
    for i in (0, 1):
        assert together[i].together == 2 and alone[i].together == 1
        assert [step for step, _ in together[i].curve] == [step for step, _ in alone[i].curve] == [1, 2, 3, 4, 5, 6]
        for (_, ours), (_, theirs) in zip(together[i].curve, alone[i].curve, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert together[i].val["val"] == pytest.approx(alone[i].val["val"], rel=1e-5)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_bits(tiny_recipe: Recipe) -> None:
    args = ["--grid", "optim.lr=1e-3,1e-2", "--grid", "seed=0,1", "--together", "2", "--steps", "24"]
    args += ["--checkpoint.every", "4", "--parallel.micro-batch", "8"]
    command = [sys.executable, "-m", "modalities.sweep", "--recipe", "tiny.json", *args]
    child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
    second = Path("sweeps/tiny/together-001")
    deadline = time.monotonic() + 200
    while not any(second.glob("step-*/manifest.json")):  # the first two are done, the others are on their way
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = sweep_results.read(Path("sweeps/tiny"))
    assert sorted(before) == [0, 1] and not Path("sweeps/tiny/sweep.png").exists()
    with Path("sweeps/tiny/results.jsonl").open("a") as file:
        file.write('{"member": 2, "overr')  # as if killed within a line
    assert comparable(run(*args)) == comparable(run(*args, "--dir", "again") and sweep_results.read(Path("again/tiny")))


def test_a_member_that_diverges_is_marked(tiny_recipe: Recipe) -> None:
    args = ("--grid", "optim.lr=1e-2,1e30", "--guard.max-bad-steps", "2", "--optim.grad-clip", "0")
    results = run(*args)
    run(*args, "--together", "1", "--dir", "alone")
    alone = sweep_results.read(Path("alone/tiny"))
    for found in (results, alone):
        assert found[0].diverged is None and found[0].loss is not None
        assert found[1].diverged is not None and found[1].loss is None and found[1].score == float("inf")
    assert results[1].diverged == alone[1].diverged
    best, _ = load("sweeps/tiny/best.py")
    assert best.optim.lr == 1e-2


def test_each_process_of_torchrun_takes_a_share(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for rank in (1, 0):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, f"{value}")  # what torchrun sets in this process
        seen.append(sorted(run("--grid", "seed=0,1,2,3")))
        assert "RANK" not in os.environ
    assert seen == [[2, 3], [0, 1, 2, 3]] and Path("sweeps/tiny/sweep.png").exists()


def test_another_grid_under_the_same_name_is_refused(tiny_recipe: Recipe, tmp_path: Path) -> None:
    run("--grid", "seed=0,1")
    for args, words in (
        (["--grid", "seed=0,2"], "another grid, of 2 member(s)"),
        (["--grid", "seed=0,1", "--optim.lr", "0.5"], "optim.lr 0.01, not 0.5"),
    ):
        with pytest.raises(ValueError, match="was begun with .*; give another --name") as error:
            run(*args)
        assert words in str(error.value)
    tiny.write_tokens(Path("other.pbin"), 4000, 7).replace(tmp_path / "train.pbin")
    with pytest.raises(ValueError, match=r"was begun with files"):
        run("--grid", "seed=0,1")
    Path("sweeps/mine").mkdir()
    Path("sweeps/mine/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"sweeps/mine is there already, and is no sweep"):
        run("--grid", "seed=0,1", "--name", "mine")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--grid", "optim.lrr=1"], "unknown field optim.lrr; OptimConfig has"),
        (["--grid", "seed.x=1"], "unknown field seed.x: seed has no fields"),
        (["--grid", "nothing.at.all=1"], "unknown field nothing"),
        (["--grid", "optim.lr=fast"], "optim.lr is 'fast', but should be float"),
        (["--grid", "optim.lr=-1"], "optim.lr is -1.0, but must be finite and not negative"),
        (["--grid", "model.width=30"], "does not divide model.width 30"),
        (["--grid", "data.global_batch=8,7"], "data.global_batch 7 is not divisible by 1 rank(s)"),
        (["--grid", "optim.lr"], "is not FIELD=VALUE,VALUE"),
        (["--grid", "optim.lr=1e-3,1e-3"], "has 0.001 twice"),
        (["--grid", "seed=0", "--grid", "seed=1"], "--grid seed is given twice"),
        (["--grid", "name=a,b"], "changes nothing that is trained"),
        (["--grid", "optim.lr=log:1e-4:1e-2"], "give --samples N"),
        (["--grid", "optim.lr=log:0:1", "--samples", "2"], "a log range from above 0"),
        (["--grid", "seed=0,1", "--together", "-1"], "--together is -1"),
        ([], "needs what to vary"),
    ],
)
def test_mistakes_are_one_line(tiny_recipe: Recipe, args: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        run(*args)
    assert message in str(error.value) and "\n" not in str(error.value) and not Path("sweeps").exists()


def test_values_and_draws(tmp_path: Path) -> None:
    base = tiny.recipe(tmp_path)
    axis = variants.parse_axis("optim.betas=(0.9,0.95),(0.8, 0.99)")
    assert axis.values == ([0.9, 0.95], [0.8, 0.99])
    assert variants.vary(base, {"optim.betas": axis.values[1]}).optim.betas == (0.8, 0.99)
    assert variants.parse_axis("data.document_mask=true,false").values == (True, False)
    assert variants.parse_axis("optim.schedule.kind=cosine,wsd").values == ("cosine", "wsd")
    axes = [variants.parse_axis(text) for text in ("optim.lr=log:1e-4:1e-2", "optim.schedule.warmup=uniform:0:5")]
    drawn = variants.combinations(axes, base, 200)
    assert drawn == variants.combinations(axes, base, 200)  # by the seed
    rates, warmups = ([each[axis.path] for each in drawn] for axis in axes)
    assert min(rates) >= 1e-4 and max(rates) <= 1e-2
    assert 70 <= sum(rate < 1e-3 for rate in rates) <= 130  # half of a log range
    assert set(warmups) == set(range(6))
    # Of values alone none is drawn twice.
    axes = [variants.parse_axis(text) for text in ("seed=0,1,2", "optim.lr=1,2,3")]
    some, every = (variants.combinations(axes, base, n) for n in (5, 0))
    assert len({str(each) for each in some}) == 5 and len(every) == 9 and all(each in every for each in some)


def test_members_are_cut_into_equal_units(tmp_path: Path) -> None:
    base = tiny.recipe(tmp_path)
    members = variants.enlist(base, [{"seed": i} for i in range(7)], tmp_path)
    assert sweep.units_of(members, lambda recipes: 7) == [[0, 1, 2, 3, 4, 5, 6]]
    assert sweep.units_of(members, lambda recipes: 3) == [[0, 1], [2, 3], [4, 5, 6]]
    assert sweep.most_together([base], 1) > 8  # of models so small there is room for many


def test_the_picture_says_what_it_shows(tmp_path: Path) -> None:
    from matplotlib import pyplot

    def result(i: int, lr: float, kind: str, loss: float | None) -> sweep_results.Result:
        facts: dict[str, Any] = {"diverged": None if loss else 3, "seconds": 1.0, "together": 4}
        curve = [(1, 5.0), (2, loss or 9.0)]
        overrides = {"optim.lr": lr, "kind": kind}
        return sweep_results.Result(member=i, overrides=overrides, loss=loss, val={"a": loss}, curve=curve, **facts)

    results = [result(0, 1e-4, "cosine", 4.0), result(1, 1e-2, "wsd", 3.0), result(2, 1.0, "wsd", None)]
    figure, panels = pyplot.subplots(1, 3)
    sweep_results.draw_axis(panels[0], results, "optim.lr")
    sweep_results.draw_axis(panels[1], results, "kind")
    sweep_results.draw_curves(panels[2], results, "optim.lr")
    assert [panel.get_xlabel() for panel in panels] == ["optim.lr", "kind", "step"]
    assert panels[0].get_ylabel() == "final validation loss [nats per token]" and panels[0].get_xscale() == "log"
    assert panels[2].get_ylabel() == "training loss [nats per token]" and len(panels[2].lines) == 3
    assert "diverged" in [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert [tick.get_text() for tick in panels[1].get_xticklabels()] == ["cosine", "wsd"]
    pyplot.close(figure)
    table = sweep_results.table(results, ["optim.lr", "kind"]).splitlines()
    assert [row.split()[0] for row in table] == ["member", "1", "0", "2"] and table[-1].endswith("at step 3")
