"""Sweeps that learn on their way: members that Optuna's TPE proposes, and successive halving.

Neither has a state of its own. A round of proposals depends on the recipe's seed and the results before it, and who
goes on after a rung on the results there, so a sweep that continues decides as one that was never stopped.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from modalities import sweep_results
from modalities.recipe import Recipe
from modalities.rng import fold
from modalities.sweep_results import Result
from modalities.variants import Axis, Member, as_field, enlist, vary

ROUND = 8
"""Members at most that TPE proposes at once, unless told otherwise: it learns between rounds alone."""
QUARTER = 4
"""So many rounds at least, and one part in so many of the members is drawn at random."""
RUNGS = (4, 2, 1)
"""Halving ranks members after these parts of their steps, the last of which is their end."""
TrainTo = Callable[[Sequence[Member], Path, int], list[Result]]
"""`train(members, folder, step)`: members that train together, to a step; their state stays in the folder."""


def load() -> Any:
    """The package; a ValueError that says how to get it."""
    try:
        import optuna
    except ImportError:
        raise ValueError("--optuna tpe needs the package optuna (pip install 'modalities[optuna]')") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def extremes(axes: Sequence[Axis], base: Recipe) -> list[Recipe]:
    """`base` with each value, and each end of a range, by itself; a ValueError where one is not allowed."""
    return [vary(base, {axis.path: value}) for axis in axes for value in axis.values or ends(axis, base)]


def ends(axis: Axis, base: Recipe) -> list[Any]:
    assert axis.range is not None
    return [as_field(x, axis.path, base) for x in axis.range[1:]]


# ------------------------------------------------------------------------------------------------------------------ TPE


def round_size(trials: int, fitting: int) -> int:
    """How many members are proposed at once, of which `fitting` fit into memory."""
    return min(fitting, ROUND, -(-trials // QUARTER))


def tpe(
    axes: Sequence[Axis], base: Recipe, folder: Path, trials: int, size: int, train: Callable[[Sequence[Member]], None]
) -> list[Member]:
    """Propose and train `trials` members, `size` at a time; `train(members)` adds what it has not to the results."""
    overrides: list[dict[str, Any]] = []
    while (done := len(overrides)) < trials:
        found = sweep_results.read(folder)
        results = [found[i] for i in range(done)]
        overrides += propose(axes, base, results, min(size, trials - done), trials)
        how = f"proposed after {done} results, the best {min(r.score for r in results):.4f}" if done else "at random"
        print(f"members {done} to {len(overrides) - 1} of {trials}: {how}", flush=True)
        train(enlist(base, overrides, folder)[done:])
    return enlist(base, overrides, folder)


def propose(
    axes: Sequence[Axis], base: Recipe, results: Sequence[Result], number: int, trials: int
) -> list[dict[str, Any]]:
    """The overrides of the next members, by the tree-structured Parzen estimator from the results so far.

    Listed values are categories to it, and ranges numbers. The members of a round count as bad ones among themselves
    (the "constant liar"), or they would all be alike; so do those that diverged.
    Source: Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011.
    """
    optuna = load()
    sampler = optuna.samplers.TPESampler(
        n_startup_trials=min(10, -(-trials // QUARTER)),
        constant_liar=True,
        seed=fold(base.seed, "tpe", len(results)) % 2**32,
    )
    study = optuna.create_study(sampler=sampler)
    space = {axis.path: distribution(axis) for axis in axes}
    for result in results:
        told = {axis.path: to_optuna(axis, result.overrides[axis.path]) for axis in axes}
        study.add_trial(optuna.trial.create_trial(params=told, distributions=space, value=result.score))
    asked = [study.ask(space).params for _ in range(number)]
    return [{axis.path: from_optuna(axis, each[axis.path], base) for axis in axes} for each in asked]


def distribution(axis: Axis) -> Any:
    distributions = load().distributions
    if axis.range is None:
        return distributions.CategoricalDistribution(range(len(axis.values)))
    kind, low, high = axis.range
    return distributions.FloatDistribution(low, high, log=kind == "log")


def to_optuna(axis: Axis, value: Any) -> int | float:
    """A member's value as the study knows it; one that rounding took out of its range is put back."""
    if axis.range is None:
        return axis.values.index(value)
    return min(max(float(value), axis.range[1]), axis.range[2])


def from_optuna(axis: Axis, told: Any, base: Recipe) -> Any:
    return axis.values[told] if axis.range is None else as_field(told, axis.path, base)


# -------------------------------------------------------------------------------------------------------------- halving


def check_halving(recipes: Sequence[Recipe], why_alone: Callable[[Recipe], str | None]) -> None:
    """A ValueError if a member cannot be stopped half-way: the ordinary loop knows no rungs."""
    for recipe in recipes:
        if why := why_alone(recipe):
            raise ValueError(
                f"--optuna halving trains members together, and {why} does not allow that; use --optuna tpe"
            )
        if recipe.steps < RUNGS[0]:
            raise ValueError(f"--optuna halving needs steps of at least {RUNGS[0]}, and steps is {recipe.steps}")


def halving(units: Sequence[Sequence[Member]], folder: Path, train: TrainTo) -> None:
    """Train all to a quarter of their steps, the better half on to a half, and of these the better half to the end.

    All members are ranked, whichever unit they are in; a unit goes on with those of it that are left. Schedules are
    those of all steps, so who goes on trains as without halving. (Optuna's own pruner of that name does not wait for
    the others, and so lets the first that come to a rung go on whatever their loss; it is not for members in step.)
    Source: Jamieson and Talwalkar, "Non-stochastic Best Arm Identification", AISTATS 2016.
    """
    alive, before = [list(unit) for unit in units], dict[int, Result]()
    for rung, part in enumerate(RUNGS, start=1):
        place = folder / f"rung-{rung}" if part > 1 else folder  # how the members stood there
        place.mkdir(exist_ok=True)
        for i, unit in enumerate(alive):
            done = sweep_results.read(place)
            if any(member.number not in done for member in unit):
                results = train(unit, folder / f"together-{i:03}", unit[0].recipe.steps // part)
                new = [result for result in results if result.member not in done]
                sweep_results.append(place, [with_time_before(result, before) for result in new])
        before = sweep_results.read(place)
        if part > 1:
            alive = stop_the_worse(alive, before, folder, part)
    for i in range(len(units)):
        shutil.rmtree(folder / f"together-{i:03}", ignore_errors=True)  # their results stay


def with_time_before(result: Result, before: dict[int, Result]) -> Result:
    earlier = before[result.member].seconds if before else 0.0
    return replace(result, seconds=round(earlier + result.seconds, 3))


def stop_the_worse(
    alive: Sequence[Sequence[Member]], at_rung: dict[int, Result], folder: Path, part: int
) -> list[list[Member]]:
    """The members that go on; the others' results, as they stood, are their final ones."""
    ranked = [at_rung[member.number] for unit in alive for member in unit]
    on = survivors(ranked)
    steps = {member.number: member.recipe.steps // part for unit in alive for member in unit}
    known = sweep_results.read(folder)
    stopped = [r if r.diverged else replace(r, stopped=steps[r.member]) for r in ranked if r.member not in on]
    sweep_results.append(folder, [result for result in stopped if result.member not in known])
    print(f"after 1/{part} of the steps {len(on)} of {len(ranked)} members go on: {sorted(on)}", flush=True)
    return [[member for member in unit if member.number in on] for unit in alive]


def survivors(results: Sequence[Result]) -> set[int]:
    """The numbers of the better half, the larger one of an odd number; none that diverged."""
    ranked = sorted(results, key=lambda result: (result.score, result.member))
    return {result.member for result in ranked[: -(-len(ranked) // 2)] if result.diverged is None}
