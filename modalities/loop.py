"""The one training loop. `train(recipe)` reads like the picture in the README; what it calls is set up above it."""

import contextlib
import functools
import gc
import itertools
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modalities import (
    attention,
    checkpoint,
    devices,
    dist,
    durable,
    ema,
    fsdp,
    generate,
    guard,
    heartbeat,
    log,
    memory,
    mup,
    noise,
    optim,
    profiling,
    saving,
    search,
    step,
    stopping,
    teacher,
    topk,
    trained,
)
from modalities.compiling import compile_seconds
from modalities.config import to_dict
from modalities.data import TrainData, open_val
from modalities.folder import Place, describe_folder, find_place, holding, kept
from modalities.loss import Batch, choose
from modalities.model import build_skeleton, flops_per_token, num_params
from modalities.recipe import Recipe, check_start
from modalities.rng import fold
from modalities.step import TrainState

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Run:
    """What a recipe becomes on this rank: pure functions, and the data that they are fed."""

    data: TrainData
    train_step: step.TrainStep
    val: Mapping[str, Iterable[Batch]]
    evaluate: Callable[[optim.Params, Callable[[], bool]], dict[str, Tensor]]
    """Loss by name of the validation set; asks between batches whether to stop, and then gives none."""
    sample: Callable[[optim.Params, int], str | None]
    """Text generated at a step; None without a tokenizer."""
    probe: guard.Probe
    """A step's gradient once more, for a closer look at it."""

    def check_data(self, samples: int) -> None:
        """Read the first batches, so that data that cannot be used shows before the run has a folder."""
        self.data.read(samples)
        for batches in self.val.values():
            next(iter(batches))


def train(recipe: Recipe, source: Path | None = None, profile: str | None = None) -> Path:
    """Train `recipe` to its end, from the newest checkpoint of its run if there is one; returns the run's folder.

    `source`: the recipe's file, kept beside it. `profile`: steps to profile, as in "10-12"; empty: three soon to come.
    """
    parallel = recipe.parallel
    with (
        dist.setup(parallel.replicate, parallel.shard, parallel.tensor) as world,
        heartbeat.beating(recipe.watchdog, world, recipe.folder) as beat,
        memory.running_out_is_explained(parallel.micro_batch),
        holding(recipe.folder) as hold,
    ):
        place = find_place(recipe, world, hold)
        facts = {"recipe": kept(recipe), "fingerprints": dict(place.fingerprints)}
        steps = profiling.choose_steps(profile, place.step, recipe.steps)
        run, state = start(recipe, source, world, place, hold)
        with (
            contextlib.closing(open_log(recipe, world, run, state, place.changes)) as out,
            profiling.watching(steps, recipe.folder / "profile", world.rank, world.device, out.say, out.aside) as watch,
            garbage_collected_together() as collect,
            stopping.listening(world) as stop,
            saving.saver(recipe.checkpoint, recipe.folder, world, facts, out.say, place.newest) as saver,
        ):
            roll_back = functools.partial(restore_newest, recipe.folder, world, saver)
            guarded = guard.Guard(recipe.guard, run.probe, roll_back, out, world, recipe.steps)

            def interrupted() -> bool:
                beat(state.step)  # a batch of an evaluation is progress too
                return stop.now()

            if lacks_evaluation(recipe, place):
                out.val(state.step, state.samples, *evaluate(run, state, interrupted))
            while state.step < recipe.steps and not stop.signal:
                with watch(state.step + 1):
                    batch = run.data.batch(state.samples)
                    state, metrics = run.train_step(state, batch)
                    out.train(state.step, state.samples, metrics)
                done, state = state.step, guarded(state, batch)
                collect(state.step)
                beat(state.step)
                agreed, losses = stop.agree(world.is_main and saver.overdue()), NONE_YET
                if state.step < done:  # rolled back, to a step that was evaluated and saved in its time
                    stop.save = agreed.save  # what is overdue is saved after the next step
                    continue

                if due(recipe.eval.every, state.step, recipe.steps) and not stop.signal:
                    with out.aside(state.step):
                        losses = evaluate(run, state, interrupted)
                        out.val(state.step, state.samples, *losses)
                if due(recipe.sample.every, state.step, recipe.steps) and not stop.signal:
                    with out.aside(state.step):
                        out.sample(state.step, recipe.sample.prompt, run.sample(state.params, state.step))
                if saver.due(state.step, recipe.steps) or agreed.save or stop.signal:
                    with out.aside(state.step):
                        saver.save(state, *losses, now=bool(stop.signal) or state.step == recipe.steps)
            saved = saver.latest
        if world.is_main and not stop.signal:
            print(summary(recipe, saved))
    stop.leave(state.step, saved)
    return recipe.folder


def due(every: int, now: int, last: int) -> bool:
    """Whether something that happens every `every` steps (0: never) and at the end happens after step `now`."""
    return now == last or (every > 0 and now % every == 0)


Losses = dict[str, Tensor]
"""By name of the validation set."""
NONE_YET: tuple[Losses, Losses] = ({}, {})


def evaluate(run: Run, state: TrainState, stopped: Callable[[], bool]) -> tuple[Losses, Losses]:
    """The losses of the weights, and of their running mean if there is one; none of either once `stopped`."""
    losses = run.evaluate(state.params, stopped)
    if not state.ema:
        return losses, {}
    with ema.as_weights(state.params, state.ema) as weights:
        of_ema = run.evaluate(weights, stopped)
    return (losses, of_ema) if of_ema else NONE_YET


def restore_newest(folder: Path, world: dist.World, saver: saving.Saver, state: TrainState) -> TrainState | None:
    """The state of the run's newest valid checkpoint, in the tensors of `state`; None if there is none."""
    saver.wait()
    with dist.all_or_none():
        newest = checkpoint.newest(folder) if world.is_main else None
    newest = saver.latest = dist.broadcast_from_main(newest)
    return checkpoint.restore(newest, state) if newest else None


@contextlib.contextmanager
def garbage_collected_together(every: int = 50) -> Iterator[Callable[[int], None]]:
    """`collect(step)` is called after each step: Python's garbage is collected at the same steps on all ranks.

    At a time of its own choosing each rank would in turn keep the others waiting. What lives after the first step
    lives on, and is not gone through again.
    """
    ours = gc.isenabled()

    def collect(step: int) -> None:
        if gc.isenabled():
            gc.disable()
            gc.collect()
            gc.freeze()
        elif step % every == 0:
            gc.collect()

    try:
        yield collect
    finally:
        gc.unfreeze()
        if ours:
            gc.enable()


def lacks_evaluation(recipe: Recipe, place: Place) -> bool:
    """Whether the state that a run begins with is to be evaluated: a new one, or one that a signal kept from it."""
    if place.newest is None:
        return recipe.eval.every > 0
    return due(recipe.eval.every, place.step, recipe.steps) and "val" not in durable.read_facts(place.newest)


def start(
    recipe: Recipe, source: Path | None, world: dist.World, place: Place, hold: Callable[[], None]
) -> tuple[Run, TrainState]:
    """The run's functions, and its state from its newest checkpoint or anew; its folder described.

    Whatever a user can have got wrong shows here, on all ranks, before the folder is touched.
    """
    chosen = search.resolve(recipe, world, build)
    with dist.all_or_none():
        check_noise(chosen, world)
        run, state = build(chosen, world)
    if place.newest:
        state = checkpoint.restore(place.newest, state)
    elif recipe.model_from:
        with dist.all_or_none():
            # On one rank, for it hashes the whole checkpoint.
            source_model = trained.find(Path(recipe.model_from)) if world.is_main else None
        found = dist.broadcast_from_main(source_model)
        assert found is not None
        with dist.all_or_none():
            check_start(recipe, found)
        trained.load_weights(found, state.params)
        ema.restart(state.ema, state.params)
    with dist.all_or_none():
        run.check_data(state.samples)
    hosts = dist.gather_objects(socket.gethostname())
    with dist.all_or_none():
        if world.is_main:
            recipe.folder.mkdir(parents=True, exist_ok=True)
            hold()
            describe_folder(recipe, source, {"hosts": hosts}, place)
    return run, state


def check_noise(recipe: Recipe, world: dist.World) -> None:
    """Raise ValueError if the recipe is to measure the noise of steps that have but one micro-batch."""
    micro_batch = recipe.parallel.micro_batch
    assert micro_batch != "auto"
    noise.check(recipe.noise, max(recipe.data.batch_sizes) // (micro_batch * world.data_size), micro_batch)


def build(recipe: Recipe, world: dist.World) -> tuple[Run, TrainState]:
    """The run's functions and its initial state: skeleton → parallelize → initial weights → functions of them."""
    sharded, vocab_size, micro_batch = world.mesh is not None, recipe.model.vocab_size, recipe.parallel.micro_batch
    assert micro_batch != "auto"
    # Where one rank alone lacks a file, the others must not go on: `parallelize` makes groups of all ranks.
    with dist.all_or_none():
        attention.choose(recipe.model.attention, world.device)
        teacher.check_recipe(recipe.distill, recipe.model, recipe.data.tokenizer, recipe.data.seq_len, world.tensor)
        notes = topk.open_notes(recipe.distill, recipe.data, vocab_size)
        data = TrainData(recipe.data, vocab_size, recipe.seed, micro_batch, world, notes)
        val = open_val(recipe.data, vocab_size, recipe.eval.samples, micro_batch, world)
        tokenizer = open_tokenizer(recipe)
    parallel, model = fsdp.without_missing_compiler(recipe.parallel, world.device), build_skeleton(recipe.model)
    names = [name for name, _ in model.named_parameters()]
    optimizer = optim.make(recipe.optim, names, functools.partial(mup.multiples, recipe.model))
    fsdp.parallelize(model, world.mesh, parallel)
    params = fsdp.init_params(model, recipe.seed, world.device, parallel.cpu_offload)
    devices.keep_freed_memory(params.values())

    sources = recipe.data.source_names
    dtype, mode, by_block = parallel.compute_dtype, parallel.compile_mode, parallel.compiles_blocks(sharded)
    whole, recompute = parallel.compiles_whole(sharded), parallel.activation_checkpointing == "selective"
    head_loss, teach = teacher.open_teacher(recipe.distill, parallel, world)
    loss_fn = step.make_loss_fn(
        model, dtype, train=True, num_sources=len(sources), loss=recipe.loss, compile_head=by_block, head_loss=head_loss
    )
    by_autograd = parallel.differentiates_by_autograd(sharded)
    grad_fn = teacher.taught(step.grad_and_value(loss_fn, sharded, whole, mode, by_autograd, recompute), teach)
    sync = functools.partial(fsdp.sync_gradients, model) if parallel.sync_gradients == "last" else None

    def lr_at(i: int) -> float:
        return optim.learning_rate(recipe.optim, i, recipe.steps, recipe.tokens_after)

    judge = guard.make_judge(recipe.guard)
    train_step = step.make_train_step(
        grad_fn, optimizer, recipe.optim.grad_clip, lr_at, recipe.seed, world, sources, sync, judge, recipe.ema,
        recipe.noise,
    )  # fmt: skip
    probe = guard.make_probe(step.make_gradients(grad_fn, recipe.seed, world, sync), model)
    eval_loss_fn = step.make_loss_fn(model, dtype, train=False, loss=recipe.loss, compile_head=by_block)
    eval_step = step.make_eval_step(eval_loss_fn, sharded, whole, mode, world.data_group)

    def evaluate(params: optim.Params, stopped: Callable[[], bool]) -> dict[str, Tensor]:
        losses = {
            name: eval_step(params, itertools.takewhile(lambda _: not stopped(), batches))
            for name, batches in val.items()
        }
        return {} if stopped() else losses

    def sample(params: optim.Params, i: int) -> str | None:
        if tokenizer is None:
            return None
        decoder = generate.make_decoder(model, params, parallel.compute_dtype, world.device)
        seed = fold(recipe.seed, "sample", i)
        return generate.continue_text(decoder, tokenizer, recipe.data.eod, recipe.sample, recipe.data.seq_len, seed)

    state = TrainState(params, optimizer.init(params), ema=ema.init(recipe.ema, params))
    return Run(data, train_step, val, evaluate, sample, probe), state


def open_tokenizer(recipe: Recipe) -> "Tokenizer | None":
    """The run's tokenizer, its folder's own if it has one; None where no text is sampled."""
    if not (recipe.sample.every and recipe.data.tokenizer):
        return None
    own, given = recipe.folder / "tokenizer.json", Path(recipe.data.tokenizer)
    changed = recipe.resume.allow_changes and given.is_file()
    return generate.load_tokenizer(own if own.is_file() and not changed else given, recipe.model.vocab_size)


def open_log(recipe: Recipe, world: dist.World, run: Run, state: TrainState, changes: Sequence[str] = ()) -> log.Log:
    """The run's log on the main rank, with a first word about the run; a silent one on the others."""
    flops = flops_per_token(recipe.model, recipe.data.seq_len)
    dtype = recipe.parallel.compute_dtype
    progress = log.Progress(
        total_steps=recipe.steps,
        global_batch=recipe.data.global_batch,
        seq_len=recipe.data.seq_len,
        flops_per_token=flops,
        peak_flops=world.size * devices.peak_flops(world.device, dtype) if world.is_main else None,
        asynchronous=world.device.type != "cpu",
        samples_after=recipe.data.samples_after,
        gauges=functools.partial(gauges, world.device, compile_seconds()),
    )
    out = log.Log(recipe.folder if world.is_main else None, recipe.log, progress, to_dict(recipe), state.step)
    compiling = "compiled (the first step takes long)" if recipe.parallel.compile != "off" else "not compiled"
    if recipe.parallel.compile != fsdp.without_missing_compiler(recipe.parallel, world.device).compile:
        compiling = "not compiled, for torch.compile finds no C++ compiler (g++): slower"
    micro_tokens = run.data.micro_batch * recipe.data.seq_len
    loss = choose(recipe.loss, micro_tokens, recipe.model.vocab_size, dtype)
    start = f"continuing {recipe.folder} after step {state.step}" if state.step else f"starting {recipe.folder}"
    out.say(
        f"{start}: {num_params(recipe.model):,} parameters, {flops / 1e6:,.3g} MFLOPs a token, "
        f"{recipe.steps} steps of {recipe.tokens_of_steps} tokens, {world.size} rank(s) on {world.device.type}, "
        f"{recipe.parallel.param_dtype}, {compiling}, loss {loss}"
    )
    if changes:
        out.changes(state.step, state.samples, changes)
    for fact in run.data.facts(recipe.data.samples_after(recipe.steps)):
        out.say(fact)
    return out


def gauges(device: torch.device, compiled_before: float) -> dict[str, float]:
    """What a line says of this rank beside the step's metrics: bytes held at most, seconds spent compiling.

    `compiled_before`: those that are not the run's own, as in the search of a micro-batch.
    """
    return {"peak_memory": devices.peak_memory(device), "compile_s": compile_seconds() - compiled_before}


def summary(recipe: Recipe, saved: Path | None) -> str:
    """What came of a run that is done, and where it lies; draws its curves."""
    folder = recipe.folder
    picture = log.plot(folder, f"{recipe.name}: {num_params(recipe.model) / 1e6:.1f}M parameters")
    lines = log.read_metrics(folder)
    last = {key: value for line in lines for key, value in line.items()}
    curve = [line["loss"] for line in lines if line.get("loss") is not None]
    names = [key for key in last if key == "loss" or key.startswith(("loss/", *log.VALIDATED))]
    losses = [f"{key} {'not finite' if last[key] is None else format(last[key], '.4f')}" for key in names]
    rows = {
        "losses": ", ".join(losses),
        "curve": f"{curve[0]:.2f} {log.sparkline(curve)} {curve[-1]:.2f}" if curve else "no finite loss",
        "curves": f"{picture}" + (f"   (tensorboard --logdir {folder.parent})" if recipe.log.tensorboard else ""),
        "metrics": folder / "metrics.jsonl",
        "checkpoint": saved,
        "text": f'python -m modalities.generate {folder} --prompt "{recipe.sample.prompt}"',
        "again": f"python train.py --recipe {folder / 'recipe.json'} --name NEW",
    }
    if not recipe.data.tokenizer:
        del rows["text"]
    return f"{recipe.name} is trained.\n" + "\n".join(f"  {key:<11} {value}" for key, value in rows.items())
