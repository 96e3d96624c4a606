"""The micro-batch by search: real steps of growing size, of which the fastest that leaves some memory free is taken.

It knows recipes; the loop gives it the function that builds a run.
"""

import functools
import gc
import hashlib
import json
import math
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from modalities import devices, dist, memory
from modalities.compiling import user_cache
from modalities.config import to_dict
from modalities.fsdp import without_missing_compiler
from modalities.loss import Batch
from modalities.recipe import Recipe, memory_per_rank
from modalities.step import TrainState, TrainStep

T = TypeVar("T")
Build = Callable[[Recipe, dist.World], tuple[Any, TrainState]]

FILL = 0.9
"""Share of the memory that may be in use at the fullest; the rest is for evaluation, samples and fragments."""
FILL_OF_GPUS = 0.95
"""The share that several GPUs may be foretold to use: where one alone ran out of memory, the others would wait."""
STEPS = 3
LONG = 10.0
"""A step that takes so long [s] is timed but once."""
SLOWER = 0.9
"""A size of less than this share of the best tokens per second ends the search."""


@dataclass(frozen=True)
class Trial:
    """What came of a size on the slowest and the fullest rank."""

    micro_batch: int
    tokens_per_s: float
    """Of all ranks; 0 where it did not run."""
    peak: float
    """Bytes in use at the fullest; foretold where it did not run."""
    verdict: str
    """Empty: it fits."""


def resolve(recipe: Recipe, world: dist.World, build: Build) -> Recipe:
    """`recipe` with a number for a `parallel.micro_batch` of "auto"; all ranks agree. A ValueError if none fits.

    An answer is kept in the user's cache, for the same model, data shape, settings, device, ranks and PyTorch. It is
    taken from there if it is foretold to fit into the memory that is free now.
    """
    if recipe.parallel.micro_batch != "auto":
        return recipe
    path, key = user_cache() / "micro_batch.json", cache_key(recipe, world)
    room = least_room(world)
    found = devices.read_json(path).get(key) if world.is_main else None
    known = dist.broadcast_from_main(found)
    # Not only `in`, for which a 1.0 or true that someone wrote is a 1.
    if type(known) is int and known in candidates(recipe, world) and foretold(recipe, known, world) <= FILL * room:
        if world.is_main:
            print(f"parallel.micro_batch auto: {known}, as found before (remove {path} to search anew)", flush=True)
        return with_size(recipe, known)
    trials = search(recipe, world, build, room)
    fitting = [trial for trial in trials if not trial.verdict]
    if world.is_main:
        print(table(trials), flush=True)
    if not fitting:
        raise ValueError(
            f"parallel.micro_batch auto: not even 1 sequence fits ({trials[0].verdict}); {memory.remedies(1)}"
        )
    best = max(fitting, key=lambda trial: trial.tokens_per_s).micro_batch
    if world.is_main:
        devices.write_json(path, devices.read_json(path) | {key: best})
        print(f"parallel.micro_batch auto: {best}", flush=True)
    return with_size(recipe, best)


def with_size(recipe: Recipe, micro_batch: int) -> Recipe:
    return replace(recipe, parallel=replace(recipe.parallel, micro_batch=micro_batch))


def cache_key(recipe: Recipe, world: dist.World) -> str:
    """A hash of all that speed and memory depend on."""
    cuda = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if cuda else f"{devices.processor()} {torch.get_num_threads()}"
    data = recipe.data
    facts = {
        "model": to_dict(recipe.model),
        "loss": to_dict(recipe.loss),
        "distill": to_dict(recipe.distill),
        "beside": [recipe.optim.kind, bool(recipe.ema.decay), bool(recipe.noise.every)],
        "parallel": to_dict(without_missing_compiler(recipe.parallel, world.device)),
        "data": [data.seq_len, data.batch_sizes, data.document_mask, len(data.train)],
        "machine": [device, world.size, torch.__version__],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def candidates(recipe: Recipe, world: dist.World) -> list[int]:
    """1, 2, 4, … as far as they divide a rank's part of every global batch; where 2 does not, the next that does.

    The noise of a step is measured by its parts: where it is, there are two at least.
    """
    share = math.gcd(*(size // world.data_size for size in recipe.data.batch_sizes))
    largest = max(recipe.data.batch_sizes) // world.data_size // (2 if recipe.noise.every else 1)
    sizes = [1]
    for divisor in range(2, min(share, largest) + 1):
        if share % divisor == 0 and divisor >= 2 * sizes[-1]:
            sizes.append(divisor)
    return sizes


def least_room(world: dist.World) -> float:
    """Bytes that each rank may still take."""
    here = dist.gather_objects(socket.gethostname()).count(socket.gethostname())
    return min(dist.gather_objects(devices.available(world.device, here)))


def foretold(recipe: Recipe, micro_batch: int, world: dist.World) -> float:
    """Bytes that a rank will need at the fullest; the most of all ranks, of whose machines some may lack a compiler."""
    parts = memory_per_rank(with_size(recipe, micro_batch), world.size, world.device.type)
    return max(dist.gather_objects(sum(parts.values())))


def search(recipe: Recipe, world: dist.World, build: Build, room: float) -> list[Trial]:
    """Trials of growing size, until one does not fit or is clearly slower; `room`: bytes that a rank may take."""
    trials: list[Trial] = []
    for size in candidates(recipe, world):
        trials.append(attempt(with_size(recipe, size), world, build, room))
        best = max(trial.tokens_per_s for trial in trials)
        if trials[-1].verdict or trials[-1].tokens_per_s < SLOWER * best:
            break
    start_peak(world.device)  # so that what the run says of its memory is its own
    return trials


def attempt(recipe: Recipe, world: dist.World, build: Build, room: float) -> Trial:
    """Some steps of a size, on parameters of their own; `room`: bytes that a rank may take.

    A size that is foretold not to fit is not tried. What remains: a rank that takes much more than foretold, and alone
    runs out of memory in the midst of an exchange, of which see `unless_full`.
    """
    size = recipe.parallel.micro_batch
    assert size != "auto"
    needed = foretold(recipe, size, world)
    # A CPU has no error that comes in time, only the kernel that ends processes.
    share = FILL if world.device.type == "cpu" else FILL_OF_GPUS if world.size > 1 else 1.0
    if needed > share * room:
        return Trial(size, 0.0, needed, f"would need {gib(needed)} of {gib(room)}")
    before = start_peak(world.device)
    seconds = time_of_trial(recipe, world, build)
    peak = max(dist.gather_objects(devices.peak_memory(world.device) - before))
    free(world.device)
    if seconds is None:
        return Trial(size, 0.0, peak, "out of memory")
    verdict = f"leaves less than {1 - FILL:.0%} of {gib(room)} free" if peak > FILL * room else ""
    return Trial(size, recipe.tokens_per_step / seconds, peak, verdict)


def unless_full(function: Callable[[], T]) -> T | None:
    """What `function` returns; None on all ranks if one runs out of memory in it.

    Where it does so in the midst of an exchange, the others wait until that times out, and the search fails.
    """
    result = None
    with dist.all_or_none():
        try:
            result = function()
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
    return result if all(dist.gather_objects(result is not None)) else None


def time_of_trial(recipe: Recipe, world: dist.World, build: Build) -> float | None:
    """Seconds of a real step, on parameters that are gone afterwards; None if a rank runs out of memory."""
    built = unless_full(functools.partial(build_trial, recipe, world, build))
    return None if built is None else unless_full(functools.partial(time_of_step, *built))


def build_trial(recipe: Recipe, world: dist.World, build: Build) -> tuple[TrainStep, TrainState, Batch]:
    run, state = build(recipe, world)
    return run.train_step, state, run.data.batch(0)


def time_of_step(train_step: TrainStep, state: TrainState, batch: Batch) -> float:
    """Median seconds of a real step, the slowest rank's; the first step, which compiles, is not counted."""
    # Two micro-batches have shown all that a step does.
    state, metrics = train_step(state, {key: value[:2] for key, value in batch.items()})
    float(metrics["loss"])
    seconds: list[float] = []
    for _ in range(STEPS):
        dist.barrier()
        began = time.perf_counter()
        state, metrics = train_step(state, batch)
        float(metrics["loss"])  # waits for the device
        seconds.append(max(dist.gather_objects(time.perf_counter() - began)))
        if seconds[-1] > LONG:
            break
    return statistics.median(seconds)


def start_peak(device: torch.device) -> int:
    """Begin to measure the peak anew; bytes in use now."""
    free(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return devices.reset_peak_of_process()


def free(device: torch.device) -> None:
    """Give back what a trial took, its compiled programs too."""
    if "torch._dynamo" in sys.modules:  # else nothing was compiled, and importing it takes a second
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def table(trials: list[Trial]) -> str:
    lines = [f"{'micro-batch':>11}  {'tokens/s':>10}  {'peak memory':>12}  verdict"]
    for trial in trials:
        speed = f"{trial.tokens_per_s:,.0f}" if trial.tokens_per_s else "-"
        lines.append(f"{trial.micro_batch:>11}  {speed:>10}  {gib(trial.peak):>12}  {trial.verdict or 'fits'}")
    return "\n".join(lines)
