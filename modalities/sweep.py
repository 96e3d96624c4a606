"""Train variants of a recipe and compare them: `python -m modalities.sweep --recipe demo --grid optim.lr=1e-3,3e-3`.

Members that differ in numbers alone train together in one program (`members`), the others one after another by the
ordinary loop. Under torchrun each process takes a share of them, on its own GPU, and none waits for another.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modalities import cli, ranks, stopping

if TYPE_CHECKING:
    from modalities.dist import World
    from modalities.members import Together
    from modalities.recipe import Recipe
    from modalities.step import TrainState
    from modalities.sweep_results import Result
    from modalities.variants import Axis, Member

PROG = "python -m modalities.sweep"
USAGE = f"""usage: [torchrun …] {PROG} --recipe NAME --grid FIELD=VALUE,… [--grid …] [--any flag of the recipe]

Trains every combination of the values, and writes sweeps/NAME/: results.jsonl, sweep.png, and best.py, the best member
as a recipe. The same command continues a sweep that was stopped.
  --grid FIELD=V1,V2,…     values of a field, as optim.lr=1e-4,3e-4 or 'optim.betas=(0.9,0.95),(0.9,0.99)'
  --grid FIELD=log:A:B     with --samples: drawn between A and B, evenly on a log scale; uniform:A:B: evenly
  --samples N              N members drawn at random (by the recipe's seed) instead of every combination
  --name NAME              the sweep's folder in --dir; by default the recipe's name
  --dir DIR                where sweeps lie; by default sweeps
  --together N             so many members at most in one program; by default as many as there is memory for
  --optuna tpe --trials N  N members, a few at a time, each time where the losses so far are promising (needs the
                           package: pip install 'modalities[optuna]'); values are drawn from lists and ranges
  --optuna halving --trials N
                           N members as of --samples; the worse half stops after a quarter of the steps, and the worse
                           half of the others after a half
{PROG} coord-check --help; {PROG} batch-size --help"""
FILL = 0.8
"""Share of the memory that members may take together."""
OVERHEAD = 1.5
"""What is measured for a member by itself, times this, is what it is reckoned to take."""


# ------------------------------------------------------------------------------------------------------- what runs when


def units_of(members: Sequence["Member"], most: Callable[[Sequence["Recipe"]], int]) -> list[list[int]]:
    """The numbers of the members that train together, at most `most(recipes)` of them; those who cannot, alone."""
    from modalities.members import alike, why_alone

    groups: dict[Recipe | int, list[int]] = {}
    recipes = {member.number: member.recipe for member in members}
    for member in members:
        key = member.number if why_alone(member.recipe) else alike(member.recipe)
        groups.setdefault(key, []).append(member.number)
    units = []
    for group in groups.values():
        number = math.ceil(len(group) / most([recipes[i] for i in group]))  # of units, about equally large
        units += [group[i * len(group) // number : (i + 1) * len(group) // number] for i in range(number)]
    return units


def most_together(recipes: Sequence["Recipe"], processes: int) -> int:
    """How many members such as these, which are alike, there is memory for, in each of `processes` on this machine."""
    import torch

    from modalities import devices
    from modalities.members import attention_of
    from modalities.recipe import memory_per_rank

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = max(recipes, key=lambda recipe: sum(rate > 0 for rate in recipe.model.dropout))
    room = FILL * devices.available(device, processes if device.type == "cpu" else 1)
    plain = dataclasses.replace(recipe.loss, implementation="plain")
    attention = dataclasses.replace(recipe.model, attention=attention_of(recipes, device))
    parts = memory_per_rank(dataclasses.replace(recipe, loss=plain, model=attention), 1, device.type)
    parts.pop("copy being saved", None)
    return max(1, int(room / (OVERHEAD * sum(parts.values()))))


def claim(folder: Path, facts: Mapping[str, Any], units: Callable[[], Any]) -> Any:
    """Make the folder this sweep's, and return what `units` says trains together; a ValueError if it is another's.

    What was decided when it began holds: the memory that is free may differ by now.
    """
    from modalities.pbin import write_beside

    path = folder / "sweep.json"
    facts = json.loads(json.dumps(facts))
    if not path.exists():
        # That file may be in the making by another process of this sweep, or have come meanwhile.
        strange = [other for other in folder.glob("*") if not other.name.startswith(path.name)]
        if strange and not path.exists():
            raise ValueError(f"{folder} is there already, and is no sweep; give another --name")
        content = (json.dumps({**facts, "units": units()}, indent=2) + "\n").encode()
        try:
            with write_beside(path) as file:
                file.write(content)
        except ValueError:  # another process of this sweep was first
            if not path.exists():
                raise
    found = json.loads(path.read_text())
    for name, value in facts.items():
        if found.get(name) != value:
            raise ValueError(f"{folder} was begun with {difference(name, found.get(name), value)}; give another --name")
    return found["units"]


def difference(name: str, was: Any, now: Any) -> str:
    """In words, in what two values of JSON differ first."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            if was.get(key) != now.get(key):
                return difference(key if name == "recipe" else f"{name}.{key}", was.get(key), now.get(key))
    if name == "members" and isinstance(was, list):
        return f"another grid, of {len(was)} member(s) such as {json.dumps(was[0])}"
    return f"{name} {was!r}, not {now!r}"


def leave_the_others() -> tuple[int, int]:
    """(number of this process, number of processes) of torchrun; from here on this process is on its own GPU, alone."""
    rank, size, local = ranks.rank(), ranks.world_size(), ranks.local_rank()
    if size > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        listed = visible.split(",") if visible else []
        os.environ["CUDA_VISIBLE_DEVICES"] = listed[local] if local < len(listed) else str(local)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    return rank, size


# ------------------------------------------------------------------------------------------------------------- training


def train_alone(member: "Member") -> "Result":
    """The member by the ordinary loop, from its newest checkpoint."""
    from modalities import log, loop
    from modalities.guard import Diverged
    from modalities.sweep_results import Result, final_loss, thinned

    began, recipe = time.perf_counter(), member.recipe
    diverged = None
    try:
        loop.train(recipe)
    except Diverged as error:
        diverged = error.first
    lines = log.read_metrics(recipe.folder)
    curve = [(int(line["step"]), line["loss"]) for line in lines if line.get("loss") is not None]
    last = {key: value for line in lines for key, value in line.items()}
    val = {name: last.get(f"val/{name}/loss") for name in recipe.data.val_names}
    return Result(
        member=member.number,
        overrides=member.overrides,
        loss=None if diverged else final_loss(curve, recipe.steps),
        val={name: None if diverged else loss for name, loss in val.items()},
        diverged=diverged,
        seconds=round(time.perf_counter() - began, 3),
        together=1,
        curve=thinned(curve),
    )


def train_together(unit: Sequence["Member"], folder: Path, until: int = 0) -> "list[Result]":
    """Members that are alike, from where an earlier start has left them, to step `until` (0: the end).

    Their state at a step before the end stays in the folder, and may go on with some of them alone.
    """
    from modalities import checkpoint, dist, durable, members
    from modalities import folder as folders
    from modalities.config import to_dict

    began, first = time.perf_counter(), unit[0].recipe
    with dist.setup() as world, folders.holding(folder) as hold, stopping.listening(world) as stop:
        together, state = members.build([member.recipe for member in unit], world)
        folder.mkdir(parents=True, exist_ok=True)
        hold()
        durable.sweep(folder)
        newest = checkpoint.newest(folder)
        if newest:
            state = restored(newest, state, unit)
        print(begin_line(unit, state, world), flush=True)
        last = until or first.steps
        while state.step < last and not stop.signal:
            state = together.step(state)
            stop.agree()
            if state.step % max(1, first.steps // 10) == 0:
                print(progress(state, first.steps, began), flush=True)
            is_due = first.checkpoint.every and state.step % first.checkpoint.every == 0
            if stop.signal or is_due or state.step == last < first.steps:
                saved = checkpoint.save(folder, state, to_dict(first), True, {"members": [m.number for m in unit]})
                for older in checkpoint.steps(folder):
                    if older != saved:
                        durable.remove(older)
                newest = saved
        results = [] if stop.signal else results_of(unit, together, state, began)
    stop.leave(state.step, newest)
    return results


def restored(path: Path, state: "TrainState", unit: Sequence["Member"]) -> "TrainState":
    """The state at a checkpoint of these members, or of more of them."""
    from modalities import checkpoint, durable, members, step

    had, numbers = durable.read_facts(path)["members"], [member.number for member in unit]
    if had == numbers:
        return checkpoint.restore(path, state)
    params = {name: param.new_empty(len(had), *param.shape[1:]) for name, param in state.params.items()}
    whole = checkpoint.restore(path, step.TrainState(params, members.init(params, unit[0].recipe.steps)))
    return members.cut(whole, [had.index(number) for number in numbers])


def begin_line(unit: Sequence["Member"], state: "TrainState", world: "World") -> str:
    from modalities.model import num_params

    recipe = unit[0].recipe
    begin = f"continuing after step {state.step}" if state.step else "starting"
    numbers = f"members {unit[0].number} to {unit[-1].number}" if len(unit) > 1 else f"member {unit[0].number}"
    if unit[-1].number - unit[0].number != len(unit) - 1:  # others between them have been stopped
        numbers = f"members {', '.join(str(member.number) for member in unit)}"
    return (
        f"{begin} {numbers} together: {len(unit)} × {num_params(recipe.model):,} parameters, {recipe.steps} steps of "
        f"{recipe.tokens_of_steps} tokens on {world.device.type}, {recipe.parallel.param_dtype}"
    )


def progress(state: "TrainState", steps: int, began: float) -> str:
    losses = state.opt_state["record"]["losses"][state.step - 1]
    finite = losses[losses.isfinite()].tolist()
    span = f"loss {min(finite):.4f} to {max(finite):.4f}" if finite else "no finite loss"
    gone = int((state.opt_state["record"]["diverged"] > 0).sum())
    return (
        f"step {state.step:>{len(str(steps))}}/{steps}  {span}{f', {gone} diverged' if gone else ''}"
        f"  {time.perf_counter() - began:.1f} s"
    )


def results_of(unit: Sequence["Member"], together: "Together", state: "TrainState", began: float) -> "list[Result]":
    """What has come of members that train together."""
    from modalities.sweep_results import Result, final_loss, thinned

    val = {name: losses.tolist() for name, losses in together.evaluate(state.params).items()}
    record = state.opt_state["record"]
    columns, diverged = record["losses"].T.tolist(), [int(step) for step in record["diverged"].tolist()]
    seconds, results = (time.perf_counter() - began) / len(unit), []
    for i, member in enumerate(unit):
        points = [(step, loss) for step, loss in enumerate(columns[i], start=1) if math.isfinite(loss)]
        results.append(
            Result(
                member=member.number,
                overrides=member.overrides,
                loss=None if diverged[i] else final_loss(points, state.step),
                val={name: finite(losses[i]) if not diverged[i] else None for name, losses in val.items()},
                diverged=diverged[i] or None,
                seconds=round(seconds, 3),
                together=len(unit),
                curve=thinned(points),
            )
        )
    return results


def finite(loss: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return loss if math.isfinite(loss) else None


# ---------------------------------------------------------------------------------------------------- the command line


def main(argv: list[str]) -> None:
    if argv and argv[0] in ("coord-check", "batch-size"):
        from modalities import coordinates, noise_advice

        commands: dict[str, Callable[..., Any]] = {"coord-check": coordinates.main, "batch-size": noise_advice.main}
        cli.call_subcommand(commands, argv, PROG, "")
        return
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    options, overrides = parse_options(argv)
    stopping.listen()
    from modalities import recipe as recipes
    from modalities.variants import combinations, enlist, parse_axis

    base, _ = recipes.load(options.recipe)
    name = options.name or base.name
    if overrides:
        base = recipes.parse(base, overrides, f"{PROG} --recipe {options.recipe}")
    folder = Path(options.dir) / name
    axes = [parse_axis(text) for text in options.grid]
    paths = [axis.path for axis in axes]
    if twice := [path for i, path in enumerate(paths) if path in paths[:i]]:
        raise ValueError(f"--grid {twice[0]} is given twice; give all of its values once, with commas between them")
    if options.optuna == "tpe":
        run_tpe(base, axes, folder, name, options)
        return
    members = enlist(base, combinations(axes, base, options.samples or options.trials), folder)
    run(base, members, folder, name, options.together, halving=options.optuna == "halving")


def parse_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the recipe's flags."""
    parser = argparse.ArgumentParser(prog=PROG, add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe")
    parser.add_argument("--grid", action="append", default=[])
    parser.add_argument("--name", default="")
    parser.add_argument("--dir", default="sweeps")
    parser.add_argument("--optuna", choices=("tpe", "halving"))
    for flag in ("--samples", "--together", "--trials"):
        parser.add_argument(flag, type=int, default=0)
    try:
        options, overrides = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"{PROG}: {error}") from None
    if options.recipe is None:
        raise ValueError(f"{PROG} needs --recipe NAME; there are {', '.join(cli.recipe_files())}")
    if not options.grid and not {"-h", "--help"} & {*overrides}:
        raise ValueError(f"{PROG} needs what to vary: --grid optim.lr=1e-4,3e-4")
    if options.optuna and (options.samples or not options.trials):
        raise ValueError(f"--optuna {options.optuna} takes --trials N, and not --samples")
    if options.trials and not options.optuna:
        raise ValueError("--trials is for --optuna; the number of members drawn at random is --samples N")
    if options.optuna and ranks.world_size() > 1:
        raise ValueError("--optuna compares members as it goes, in one process; start it without torchrun")
    for flag in ("samples", "together", "trials"):
        if getattr(options, flag) < 0:
            raise ValueError(f"--{flag} is {getattr(options, flag)}, but must be at least 1, or left out")
    if "/" in options.name:
        raise ValueError(f"--name is {options.name!r}, but must be a folder's name; --dir says where it lies")
    return options, overrides


def run(
    base: "Recipe", members: Sequence["Member"], folder: Path, name: str, together: int = 0, halving: bool = False
) -> None:
    """Train what has no result yet, and once all have one, show and draw them."""
    from modalities import optuna_search, sweep_results
    from modalities.members import why_alone
    from modalities.recipe import check_ranks

    recipes = [member.recipe for member in members]
    for recipe in recipes:
        check_ranks(recipe, 1)  # now, and not when its turn comes
    if halving:
        optuna_search.check_halving(recipes, why_alone)
    here = ranks.local_world_size()
    rank, size = leave_the_others()

    def most(recipes: Sequence["Recipe"]) -> int:
        # Under torchrun each process is to have a share.
        return min(together or most_together(recipes, here), math.ceil(len(members) / size))

    facts = facts_of(base, recipes, "halving" if halving else None, members=[dict(m.overrides) for m in members])
    units = claim(folder, facts, lambda: units_of(members, most))
    if halving:
        optuna_search.halving([[members[number] for number in unit] for unit in units], folder, train_together)
    else:
        train_units({i: unit for i, unit in enumerate(units) if i % size == rank}, members, folder)
    found = sweep_results.read(folder)
    if len(found) == len(members):
        print(conclude(base, members, [found[i] for i in sorted(found)], folder, name))


def run_tpe(base: "Recipe", axes: "Sequence[Axis]", folder: Path, name: str, options: argparse.Namespace) -> None:
    """Train members that Optuna proposes round by round, and show and draw them."""
    from modalities import optuna_search as search
    from modalities import sweep_results

    package, extremes = search.load(), search.extremes(axes, base)

    def round_size() -> int:
        fitting = min(most_together([recipe], 1) for recipe in extremes)
        return options.together or search.round_size(options.trials, fitting)

    kind = f"tpe of optuna {package.__version__}"  # another version may propose other members
    facts = facts_of(base, extremes, kind, grid=options.grid, trials=options.trials)
    size = claim(folder, facts, round_size)

    def train(members: Sequence["Member"]) -> None:
        # A round's units are numbered after all that can have been before it.
        units = units_of(members, lambda recipes: size)
        train_units(dict(enumerate(units, start=members[0].number)), members, folder)

    members = search.tpe(axes, base, folder, options.trials, size, train)
    found = sweep_results.read(folder)
    print(conclude(base, members, [found[i] for i in sorted(found)], folder, name))


def facts_of(base: "Recipe", recipes: Sequence["Recipe"], optuna: str | None, **members: Any) -> dict[str, Any]:
    """What makes a sweep this one; `recipes` are all that name its files."""
    from modalities import fingerprints
    from modalities.config import to_dict

    files = fingerprints.of_files({path: path for recipe in recipes for path in recipe.data.files.values()})
    return {"optuna": optuna, "recipe": to_dict(dataclasses.replace(base, name="")), **members, "files": files}


def train_units(units: Mapping[int, Sequence[int]], members: Sequence["Member"], folder: Path) -> None:
    """Train the members of each unit, by its number, that have no result yet."""
    from modalities import sweep_results

    of_number = {member.number: member for member in members}
    for i, unit in units.items():
        missing = [number for number in unit if number not in sweep_results.read(folder)]
        if not missing:
            continue
        if len(unit) == 1:
            results = [train_alone(of_number[unit[0]])]
        else:
            results = train_together([of_number[number] for number in unit], folder / f"together-{i:03}")
        sweep_results.append(folder, [result for result in results if result.member in missing])
        shutil.rmtree(folder / f"together-{i:03}", ignore_errors=True)  # its results stay


def conclude(base: "Recipe", members: Sequence["Member"], results: "Sequence[Result]", folder: Path, name: str) -> str:
    """Draw the picture and write the best member's recipe; returns the table and where all of it lies."""
    from modalities import sweep_results
    from modalities.model import num_params

    axes = list(members[0].overrides)
    lines = [sweep_results.table(results, axes)]
    sizes = sorted({num_params(member.recipe.model) for member in members})
    size = " to ".join(f"{size / 1e6:.3g}M" for size in dict.fromkeys((sizes[0], sizes[-1])))
    title = f"{name}: {len(results)} members of {size} parameters, {members[0].recipe.steps} steps"
    sweep_results.plot(results, axes, title, folder / "sweep.png")
    lines.append(f"  picture  {folder / 'sweep.png'}\n  results  {folder / 'results.jsonl'}")
    best = min(results, key=lambda result: result.final_score)
    if math.isinf(best.final_score):
        return "\n".join([*lines, "  no best member: all diverged"])
    path = folder / "best.py"
    recipe = dataclasses.replace(members[best.member].recipe, name=f"{name}-best", log=base.log)
    values = ", ".join(f"{axis} {sweep_results.shown(value)}" for axis, value in best.overrides.items())
    docstring = (
        f"The best of {len(results)} members of the sweep {name}: {values}; loss {best.score:.4f}.\n\n"
        f"    python train.py --recipe {path}\n"
    )
    if not path.exists():  # it may have been changed since
        sweep_results.replace_file(path, sweep_results.as_python(recipe, docstring).encode())
    return "\n".join([*lines, f"  best     member {best.member} ({values}): python train.py --recipe {path}"])


if __name__ == "__main__":
    cli.run(main)
