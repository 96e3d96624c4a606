"""Sweeps that learn on their way: what TPE proposes, who goes on after a rung, and that both continue."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from modalities import optuna_search, sweep, sweep_results, variants
from modalities.config import to_dict
from modalities.recipe import Recipe, load
from modalities.sweep_results import Result

RATES = "optim.lr=log:1e-4:1e-1"


@pytest.fixture
def tiny_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The tiny recipe, of 8 steps, as `tiny.json` in the working directory."""
    monkeypatch.chdir(tmp_path)  # sweeps lie in the working directory
    recipe = tiny.recipe(tmp_path, steps=8)
    parallel = replace(recipe.parallel, micro_batch=recipe.data.global_batch)
    recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, every=3), parallel=parallel)
    (tmp_path / "tiny.json").write_text(json.dumps(to_dict(recipe)))
    return recipe


@pytest.fixture
def with_optuna() -> None:
    pytest.importorskip("optuna")  # an extra, which a user may do without


def run(*args: str) -> dict[int, Result]:
    sweep.main(["--recipe", "tiny.json", *args])
    folder = args[args.index("--dir") + 1] if "--dir" in args else "sweeps"
    return sweep_results.read(Path(folder) / "tiny")


def comparable(results: dict[int, Result]) -> list[Result]:
    return [replace(result, seconds=0.0) for _, result in sorted(results.items())]


def result(number: int, overrides: dict[str, Any], loss: float | None) -> Result:
    diverged = None if loss is not None else 3
    facts: dict[str, Any] = {"val": {}, "diverged": diverged, "seconds": 1.0, "together": 1, "curve": ()}
    return Result(member=number, overrides=overrides, loss=loss, **facts)


def same_curve(ours: Result, theirs: Result, steps: int) -> None:
    assert [step for step, _ in ours.curve] == list(range(1, steps + 1))
    for (_, a), (_, b) in zip(ours.curve, theirs.curve, strict=False):
        assert a == pytest.approx(b, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------------ TPE


def test_tpe_goes_where_the_losses_are_low(tmp_path: Path, with_optuna: None) -> None:
    """On a loss whose minimum is known, over a log range, whole numbers and listed values; some members diverge."""
    base = tiny.recipe(tmp_path)
    grid = (RATES, "optim.schedule.warmup=uniform:0:10", "optim.betas=(0.9,0.95),(0.8,0.99)")
    axes = [variants.parse_axis(text) for text in grid]

    def loss(each: dict[str, Any]) -> float | None:
        if each["optim.lr"] > 0.05:
            return None  # it diverges
        return abs(math.log10(each["optim.lr"] / 1e-3)) + (each["optim.betas"] != [0.9, 0.95])

    results: list[Result] = []
    while len(results) < 40:
        proposed = optuna_search.propose(axes, base, results, 4, trials=40)
        assert proposed == optuna_search.propose(axes, base, results, 4, trials=40)  # by the seed and the results
        assert len({str(each) for each in proposed}) == 4
        results += [result(len(results) + i, each, loss(each)) for i, each in enumerate(proposed)]
    assert {type(each.overrides["optim.schedule.warmup"]) for each in results} == {int}
    assert all(1e-4 <= each.overrides["optim.lr"] <= 1e-1 for each in results)

    def mean(some: Sequence[Result], what: Callable[[dict[str, Any]], float]) -> float:
        return sum(what(dict(each.overrides)) for each in some) / len(some)

    def distance(each: dict[str, Any]) -> float:
        return abs(math.log10(each["optim.lr"] / 1e-3))

    # Of a random search the mean distance is 5/6: the range is a factor of 10 below the minimum and 100 above it.
    assert mean(results[-16:], distance) < 0.5
    assert mean(results[-16:], lambda each: each["optim.betas"] == [0.9, 0.95]) > 0.7
    assert optuna_search.propose(axes, replace(base, seed=1), [], 4, 40) != optuna_search.propose(axes, base, [], 4, 40)


def test_tpe_from_the_command_line_goes_on_after_a_kill(
    tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str], with_optuna: None
) -> None:
    args = ["--grid", RATES, "--optuna", "tpe", "--trials", "4", "--together", "2", "--steps", "4"]
    whole = run(*args)
    said = capsys.readouterr().out
    assert "members 0 to 1 of 4: at random" in said and "members 2 to 3 of 4: proposed after 2 results" in said
    assert sorted(whole) == [0, 1, 2, 3] and {each.together for each in whole.values()} == {2}
    assert Path("sweeps/tiny/sweep.png").read_bytes().startswith(b"\x89PNG")
    winner = min(whole.values(), key=lambda each: each.score)
    expected = variants.vary(tiny_recipe, {**winner.overrides, "steps": 4})
    assert load("sweeps/tiny/best.py")[0] == replace(expected, name="tiny-best")
    # As if killed within the last round, while its line was written.
    shutil.copytree("sweeps", "killed")
    lines = Path("sweeps/tiny/results.jsonl").read_text().splitlines(keepends=True)
    Path("killed/tiny/results.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    assert comparable(run(*args, "--dir", "killed")) == comparable(whole)
    assert Path("killed/tiny/results.jsonl").read_text().startswith("".join(lines[:2]))  # these were not run again
    with pytest.raises(ValueError, match="was begun with trials 4, not 6; give another --name"):
        run(*args, "--trials", "6")


def test_without_the_package_one_line_says_how_to_get_it(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)  # Python's way to say that it cannot be imported
    with pytest.raises(ValueError) as error:
        run("--grid", RATES, "--optuna", "tpe", "--trials", "4")
    assert str(error.value) == "--optuna tpe needs the package optuna (pip install 'modalities[optuna]')"
    assert not Path("sweeps").exists()


# -------------------------------------------------------------------------------------------------------------- halving


def test_halving_stops_the_worse_half_and_leaves_the_others_as_they_were(
    tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against a sweep of the same members in which all come to their end."""
    args = ["--grid", RATES, "--grid", "seed=0,1", "--together", "5"]
    results = run(*args, "--optuna", "halving", "--trials", "5")
    said = capsys.readouterr().out
    every = run(*args, "--samples", "5", "--dir", "all")
    assert [each.overrides for each in comparable(results)] == [each.overrides for each in comparable(every)]
    ended = {number: each.stopped or 8 for number, each in results.items()}
    assert sorted(ended.values()) == [2, 2, 4, 8, 8]
    for number, each in results.items():
        same_curve(each, every[number], ended[number])
        if ended[number] == 8:
            assert each.val["val"] == pytest.approx(every[number].val["val"], rel=1e-5)
    # At each rung those went on that had the lower losses there.
    for rung, step in ((1, 2), (2, 4)):
        at_rung = sweep_results.read(Path(f"sweeps/tiny/rung-{rung}"))
        on = [each.score for number, each in at_rung.items() if ended[number] > step]
        assert max(on) <= min(each.score for number, each in at_rung.items() if ended[number] == step)
    best = min((each for each in results.values() if not each.stopped), key=lambda each: each.score)
    assert load("sweeps/tiny/best.py")[0].optim.lr == best.overrides["optim.lr"]
    assert "stopped after step 2" in said and f"best     member {best.member}" in said
    assert not list(Path("sweeps/tiny").glob("together-*"))


def test_halving_goes_on_where_it_was_interrupted(tiny_recipe: Recipe) -> None:
    values = [{"optim.lr": lr, "seed": seed} for seed in (0, 1) for lr in (1e-4, 1e-2, 3e-2)]
    results = []
    for calls in ((), (1, 2, 4)):  # the calls of `train` that are interrupted
        folder = Path(f"interrupted-{len(calls)}")
        folder.mkdir()
        members = variants.enlist(tiny_recipe, values, folder)
        number = iter(range(100))

        def train(unit: Sequence[variants.Member], folder: Path, until: int) -> list[Result]:
            if next(number) in calls:  # noqa: B023
                sweep.train_together(unit, folder, until - 1)  # its state lies one step before
                raise KeyboardInterrupt
            return sweep.train_together(unit, folder, until)

        for _ in range(len(calls)):
            with pytest.raises(KeyboardInterrupt):
                optuna_search.halving([members[:3], members[3:]], folder, train)
        optuna_search.halving([members[:3], members[3:]], folder, train)
        results.append(comparable(sweep_results.read(folder)))
    assert results[0] == results[1] and len(results[0]) == 6
    assert sorted(each.stopped or 8 for each in results[0]) == [2, 2, 2, 4, 8, 8]


def test_the_table_and_the_picture_tell_who_was_stopped() -> None:
    from matplotlib import pyplot

    results = [replace(result(i, {"optim.lr": 10.0**-i}, loss), stopped=s) for i, loss, s in STANDINGS]
    figure, panel = pyplot.subplots()
    sweep_results.draw_axis(panel, results, "optim.lr")
    marks = {line.get_label(): list(line.get_xdata()) for line in panel.lines}
    assert marks["stopped early"] == [1.0, 0.01, 0.001] and marks["diverged"] == [0.0001]
    low, high = panel.get_xlim()
    assert low < 0.0001 and high > 1.0  # the marks are in the picture
    pyplot.close(figure)
    rows = [row.split() for row in sweep_results.table(results, ["optim.lr"]).splitlines()]
    assert [row[0] for row in rows] == ["member", "1", "5", "3", "0", "2", "4"]
    assert [" ".join(row[3:]) for row in rows[2:4]] == ["", "stopped after step 4"]


STANDINGS = [(0, 1.0, 2), (1, 2.0, None), (2, 3.0, 2), (3, 4.0, 4), (4, None, None), (5, 5.0, None)]
"""Member, loss, and the step after which it was stopped: one stopped early may have had the lowest loss of all."""


def test_a_diverged_member_does_not_go_on() -> None:
    losses: list[float | None] = [3.0, None, 2.0, None, None]
    results = [result(i, {}, loss) for i, loss in enumerate(losses)]
    assert optuna_search.survivors(results) == {0, 2}
    assert optuna_search.survivors(results[1:2]) == set()
    assert optuna_search.survivors([result(i, {}, 1.0) for i in range(4)]) == {0, 1}  # of equals the first


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--optuna", "tpe"], "--optuna tpe takes --trials N"),
        (["--optuna", "halving", "--samples", "3"], "--optuna halving takes --trials N, and not --samples"),
        (["--trials", "3"], "--trials is for --optuna"),
        (["--optuna", "grid", "--trials", "3"], "invalid choice: 'grid'"),
        (["--optuna", "halving", "--trials", "-3"], "--trials is -3, but must be at least 1"),
        (["--optuna", "halving", "--trials", "3", "--steps", "3"], "needs steps of at least 4, and steps is 3"),
        (["--optuna", "halving", "--trials", "3", "--optim.kind", "muon"], "optim.kind does not allow that"),
    ],
)
def test_mistakes_are_one_line(tiny_recipe: Recipe, args: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        run("--grid", RATES, *args)
    assert message in str(error.value) and "\n" not in str(error.value) and not Path("sweeps").exists()


def test_wrong_values_show_before_the_first_round(tiny_recipe: Recipe, with_optuna: None) -> None:
    for grid, message in (("optim.lr=uniform:-1:1", "optim.lr is -1.0"), ("model.width=32,30", "model.width 30")):
        with pytest.raises(ValueError, match=message):
            run("--grid", grid, "--optuna", "tpe", "--trials", "4")
    assert not Path("sweeps").exists()


def test_ranks_of_torchrun_are_refused(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # what torchrun sets in this process
    with pytest.raises(ValueError, match="start it without torchrun"):
        run("--grid", RATES, "--optuna", "halving", "--trials", "4")
