"""Bad numbers, loss spikes, and ranks that compute wrongly: real ones, in real runs."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from modalities import checkpoint, dist, guard, loop
from modalities.checkpoint import CheckpointConfig
from modalities.data import TrainData
from modalities.fsdp import ParallelConfig
from modalities.generate import SampleConfig
from modalities.guard import Guard, GuardConfig, checksum
from modalities.log import Log, Progress, read_metrics
from modalities.model import Block
from modalities.optim import OptimConfig, ScheduleConfig, local
from modalities.pbin import open_pbin, write_pbin
from modalities.recipe import Recipe
from modalities.step import TrainState, agreed

WORLD = dist.World(rank=0, size=1, device=torch.device("cpu"), mesh=None)
DIVERGES = OptimConfig(lr=1e12, schedule=ScheduleConfig(kind="constant"))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_bad_steps": 0}, "max_bad_steps is 0, but must be at least 1"),
        ({"spike_sigma": -1.0}, "spike_sigma is -1.0"),
        ({"spike_sigma": math.nan}, "spike_sigma is nan"),
        ({"spike_window": 1}, "spike_window is 1, but must be at least 2"),
        ({"replicas_every": -1}, "replicas_every is -1"),
    ],
)
def test_an_impossible_guard_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"guard.{named}"):
        GuardConfig(**fields)


def silent_log(recipe: Recipe) -> Log:
    return Log(None, recipe.log, Progress(100, recipe.data.global_batch, recipe.data.seq_len, 1, None, False), {})


def bits(state: TrainState) -> list[Tensor]:
    """A copy of all that an update changes."""
    columns = [state.params, *state.opt_state.values()]
    return [local(tensor).detach().clone() for column in columns for tensor in column.values()]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    """To the bit, whatever the bits stand for."""
    return all(
        torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)) for a, b in zip(one, two, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------- bad numbers


@pytest.mark.parametrize("compile", ["off", pytest.param("model", marks=[tiny.needs_compiler, pytest.mark.slow])])
def test_a_step_whose_loss_is_not_finite_changes_no_bit_of_the_weights(
    tmp_path: Path, compile: Literal["off", "model"]
) -> None:
    parallel = ParallelConfig(micro_batch=4, param_dtype="float32", compile=compile)
    recipe = tiny.recipe(tmp_path, optim=DIVERGES, parallel=parallel)
    run, state = loop.build(recipe, WORLD)
    state, metrics = run.train_step(state, run.data.batch(state.samples))
    assert float(metrics["loss"]) < 10 and state.guard["skipped"] == 0
    before, moved = bits(state), state.samples
    for i in range(1, 4):
        state, metrics = run.train_step(state, run.data.batch(state.samples))
        assert not math.isfinite(float(metrics["loss"])) and same(bits(state), before)
        assert (state.step, state.samples) == (1 + i, moved + 8 * i)
        assert metrics["skipped"] == i and state.guard["in_row"] == i


def test_a_run_that_diverges_stops_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny.recipe(tmp_path, optim=DIVERGES, guard=GuardConfig(max_bad_steps=4), eval=tiny.EvalConfig(every=0))
    with pytest.raises(ValueError) as caught:
        loop.train(recipe)
    line = str(caught.value)
    # The first step makes the weights huge, the next four are skipped.
    assert line.startswith(
        "4 steps in a row were skipped, up to step 5 with samples 32 to 39: not finite: the loss of rank 0 "
    )
    assert "and the gradient of embed.weight, the first such parameter; lower optim.lr" in line
    assert "\n" not in line and not list(recipe.folder.glob("step-*"))
    lines = read_metrics(recipe.folder)
    assert [line.get("skipped") for line in lines] == [None, 1, 2, 3, 4] and lines[-1]["loss"] is None
    printed = capsys.readouterr().out.splitlines()
    assert "skipped" not in printed[-5] and all(f"  skipped {i}  " in printed[i - 5] for i in range(1, 5))


class BadRank:
    """Hardware that goes wrong on one rank: what a block gives, or its gradient, is changed in some of its calls.

    PyTorch's hook for all modules is the way in, so that the code under test runs as it is.
    """

    def __init__(self, rank: int, calls_per_step: int) -> None:
        self.rank, self.calls_per_step, self.calls = rank, calls_per_step, 0
        self.loss_at: Callable[[int], bool] = lambda step: False
        self.gradient_at: Callable[[int], bool] = lambda step: False
        self.wrong = math.nan
        """What a gradient is multiplied with; a number is another one each time."""

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(module, Block) or dist.ranks.rank() != self.rank:
            return None
        step, call = divmod(self.calls, self.calls_per_step)
        self.calls += 1
        if call != self.calls_per_step - 1:
            return None
        if self.gradient_at(step + 1):
            factor = 1 + step * self.wrong
            output.register_hook(lambda grad: grad * factor)
        return output * math.inf if self.loss_at(step + 1) else None


def train_with_bad_rank(recipe: Recipe) -> None:
    # 4 sequences a rank in micro-batches of 2, each through two blocks.
    bad = BadRank(rank=1, calls_per_step=4)
    bad.loss_at, bad.gradient_at = lambda step: step == 2, lambda step: step >= 5
    register_module_forward_hook(bad)
    with pytest.raises(ValueError) as caught:
        loop.train(recipe)
    assert str(caught.value).startswith(
        "3 steps in a row were skipped, up to step 7 with samples 48 to 55: not finite: the gradient of rank 1 "
        "and the gradient of embed.weight, the first such parameter"
    )


def saved(recipe: Recipe, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name."""
    _, state = loop.build(replace(recipe, parallel=replace(recipe.parallel, compile="off")), WORLD)
    state = checkpoint.restore(recipe.folder / f"step-{step:08}", state)
    columns = {"params": state.params, **state.opt_state}
    return {f"{column}.{name}": tensor for column in columns for name, tensor in columns[column].items()}


@pytest.mark.parametrize("compile", ["off", pytest.param("block", marks=[tiny.needs_compiler, pytest.mark.slow])])
def test_bad_numbers_on_one_of_two_ranks_are_skipped_by_both_and_named(
    tmp_path: Path, compile: Literal["off", "block"]
) -> None:
    recipe = tiny.recipe(tmp_path, steps=20, guard=GuardConfig(max_bad_steps=3), eval=tiny.EvalConfig(every=0))
    recipe = replace(recipe, checkpoint=CheckpointConfig(every=1), parallel=replace(recipe.parallel, compile=compile))
    tiny.run_ranks(2, train_with_bad_rank, recipe)
    states = {step: saved(recipe, step) for step in range(1, 7)}
    assert len(states[1]) > 40 and not (recipe.folder / "step-00000007").exists()
    for before, after, is_same in ((1, 2, True), (2, 3, False), (3, 4, False), (4, 5, True), (5, 6, True)):
        changed = [name for name, tensor in states[after].items() if not torch.equal(tensor, states[before][name])]
        assert (not changed) if is_same else len(changed) == len(states[1]), f"{before} to {after}: {changed}"
    lines = [line for line in read_metrics(recipe.folder) if "loss" in line]
    assert [line.get("skipped", 0) for line in lines] == [0, 1, 1, 1, 2, 3, 4]
    assert [line["loss"] is None for line in lines] == [False, True, False, False, False, False, False]


def test_what_the_judge_does_waits_for_no_device() -> None:
    """A tensor on "meta" has no value, so that reading one would raise."""
    judge, meta = guard.make_judge(GuardConfig(spike_sigma=3.0)), torch.device("meta")
    kept, skip = judge({}, torch.zeros((), device=meta), torch.zeros((), dtype=torch.bool, device=meta))
    kept, skip = judge(kept, torch.zeros((), device=meta), torch.zeros((), dtype=torch.bool, device=meta))
    assert skip.dtype == torch.float32 and kept["losses"].shape == (100,)


@pytest.mark.parametrize(
    ("steps", "bad_steps", "named", "seen_at"),
    [
        (40, range(12, 29), 21, 22),
        # The probe's own look at step 30 is the 31st.
        (30, range(21, 32), 30, 30),
        (30, range(15, 32), 24, 25),
        (30, range(22, 31), None, 30),
    ],
    ids=["between two tens", "up to the last step", "longer, at the end", "one too few"],
)
def test_on_a_gpu_each_count_is_read_one_step_late(
    tmp_path: Path, steps: int, bad_steps: range, named: int | None, seen_at: int
) -> None:
    """The tensors are the CPU's, which has no GPU's clock: what is seen here is which steps are read, and when."""
    parallel = ParallelConfig(micro_batch=8, param_dtype="float32", compile="off")
    recipe = tiny.recipe(tmp_path, steps=steps, parallel=parallel)
    run, state = loop.build(recipe, WORLD)
    as_on_gpu = replace(WORLD, device=torch.device("cuda"))
    guarded = Guard(recipe.guard, run.probe, lambda state: None, silent_log(recipe), as_on_gpu, steps)
    bad = BadRank(rank=0, calls_per_step=2)
    bad.loss_at = lambda step: step in bad_steps
    hook, line = register_module_forward_hook(bad), None
    try:
        while state.step < steps:
            batch = run.data.batch(state.samples)
            state, _ = run.train_step(state, batch)
            state = guarded(state, batch)
    except ValueError as error:
        line = str(error)
    finally:
        hook.remove()
    assert state.step == seen_at
    if named is None:
        assert line is None and state.guard["in_row"] == 9
    else:
        samples = f"samples {8 * named - 8} to {8 * named - 1}: not finite: the loss of rank 0"
        assert line and line.startswith(f"10 steps in a row were skipped, up to step {named} with {samples}")


# --------------------------------------------------------------------------------------------------------------- spikes


def spiky_recipe(folder: Path, config: GuardConfig, bad_steps: range, **changes: Any) -> Recipe:
    """30 steps without an epoch's end, whose batches are random tokens where they are those of `bad_steps`."""
    path = folder / "train.pbin"
    recipe = tiny.recipe(folder, steps=30, guard=config, eval=tiny.EvalConfig(every=0), **changes)
    tokens = np.asarray(open_pbin(tiny.write_tokens(folder / "plain.pbin", 24_000)).tokens, np.int64)
    data = replace(recipe.data, train=(str(folder / "plain.pbin"),), val=())
    order = TrainData(data, 100, recipe.seed, 2, WORLD)
    for step in bad_steps:
        for number in order.order(8 * (step - 1))[1]:
            tokens[32 * number + 1 : 32 * number + 33] = np.random.default_rng(number).integers(0, 100, 32)
    path.unlink()
    with write_pbin(path, 100) as append:
        append(tokens)
    return replace(recipe, data=replace(data, train=(str(path),)))


SKIP = GuardConfig(spike_sigma=4.0, spike_window=8)


def test_a_spike_is_skipped_and_a_resumed_run_knows_the_losses_before(tmp_path: Path) -> None:
    recipe = spiky_recipe(tmp_path, SKIP, range(23, 24))
    loop.train(recipe)
    window: list[float] = []
    skipped = []
    for line in read_metrics(recipe.folder):
        if len(window) == 8 and line["loss"] > np.mean(window) + 4 * np.std(window, ddof=1):
            skipped.append(line["step"])
        else:
            window = [*window, line["loss"]][-8:]
        assert line.get("skipped", 0) == len(skipped)
    assert skipped == [23]
    # Step 23 is a spike by the losses from step 15 on, and a run that goes on from step 20 has them from there.
    resumed = replace(recipe, name="resumed")
    shutil.copytree(recipe.folder, resumed.folder, ignore=shutil.ignore_patterns("step-00000030"))
    loop.train(resumed)
    assert_same(saved(recipe, 30), saved(resumed, 30))
    assert read_metrics(resumed.folder)[-1]["skipped"] == 1


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys() and len(one) > 40
    assert all(torch.equal(one[name], two[name]) for name in one)


ROLL_BACK = replace(SKIP, spike_action="rollback")


def positions(folder: Path) -> list[tuple[int, int]]:
    """(step, samples) of every line of training, in the order in which they were written."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["samples"]) for line in lines if "loss" in line]


def test_a_spike_rolls_back_and_its_samples_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = spiky_recipe(tmp_path, ROLL_BACK, range(23, 24), checkpoint=CheckpointConfig(every=5))
    loop.train(recipe)
    there = [(step, 8 * step) for step in range(1, 24)]
    again = [(step, 8 * (step + 3)) for step in range(21, 31)]
    assert positions(recipe.folder) == there + again
    assert (
        "step 23: a loss spike with samples 176 to 183; back to step 20, passing over 24 sequences, 160 to 183\n"
    ) in capsys.readouterr().out
    # With fewer losses than the window holds, the manifest is still JSON, which has no NaN.
    for step, samples in ((5, 40), (20, 160), (25, 8 * 28), (30, 8 * 33)):
        text = (recipe.folder / f"step-{step:08}" / "manifest.json").read_text()
        assert json.loads(text, parse_constant=pytest.fail)["samples"] == samples
    assert "skipped" not in read_metrics(recipe.folder)[-1], "what was rolled back was not skipped"
    # A run that dies after the rollback, before it saves, comes to it again; one that dies later goes on behind it.
    for name, gone in (("soon", ("step-00000025", "step-00000030")), ("late", ("step-00000030",))):
        resumed = replace(recipe, name=name)
        shutil.copytree(recipe.folder, resumed.folder, ignore=shutil.ignore_patterns(*gone))
        loop.train(resumed)
        assert_same(saved(recipe, 30), saved(resumed, 30))
    assert positions(tmp_path / "runs" / "soon")[33:] == there[20:] + again


def test_the_step_that_a_run_goes_back_to_is_not_evaluated_nor_sampled_again(tmp_path: Path) -> None:
    words = {str(i): i for i in range(99)} | {"<|endoftext|>": 99}
    Tokenizer(models.WordLevel(words, unk_token="0")).save(str(tmp_path / "tokenizer.json"))
    recipe = spiky_recipe(tmp_path, ROLL_BACK, range(23, 24), checkpoint=CheckpointConfig(every=5))
    data = replace(recipe.data, val=(str(tmp_path / "val.pbin"),), tokenizer=str(tmp_path / "tokenizer.json"))
    sample = SampleConfig(every=5, prompt="1", num_tokens=2)
    loop.train(replace(recipe, data=data, eval=tiny.EvalConfig(every=5, samples=2), sample=sample))
    assert positions(recipe.folder)[22:24] == [(23, 8 * 23), (21, 8 * 24)], "it went back"
    for name, steps in (("metrics", range(0, 31, 5)), ("samples", range(5, 31, 5))):
        lines = [json.loads(line) for line in (recipe.folder / f"{name}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" not in line] == list(steps), name


def test_a_checkpoint_that_is_overdue_at_a_rollback_is_saved_after_it(tmp_path: Path) -> None:
    checkpoints = CheckpointConfig(every=0, every_minutes=1e-9)
    recipe = spiky_recipe(tmp_path, ROLL_BACK, range(23, 24), checkpoint=checkpoints)
    loop.train(recipe)
    assert positions(recipe.folder)[22:24] == [(23, 8 * 23), (23, 8 * 24)], "it went back to step 22"
    for step in range(1, 31):
        manifest = checkpoint.read_manifest(recipe.folder / f"step-{step:08}")
        assert manifest["samples"] == 8 * (step + (step > 22))


def test_without_a_checkpoint_a_spike_is_skipped(tmp_path: Path) -> None:
    recipe = spiky_recipe(tmp_path, ROLL_BACK, range(23, 24), checkpoint=CheckpointConfig(every=0))
    loop.train(recipe)
    assert positions(recipe.folder) == [(step, 8 * step) for step in range(1, 31)]
    assert read_metrics(recipe.folder)[-1]["skipped"] == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ROLL_BACK, r"again after 3 rollbacks to step 20, at step 21 with samples 200 to 207; raise guard.spike_sigma"),
        (replace(SKIP, max_bad_steps=5), r"^5 steps in a row .* up to step 27 with samples 208 to 215: a loss more"),
    ],
    ids=["rollback", "skip"],
)
def test_spikes_that_do_not_end_stop_the_run(tmp_path: Path, config: GuardConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop.train(spiky_recipe(tmp_path, config, range(23, 31)))


# --------------------------------------------------------------------------------------------------- silent corruption


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_no_flipped_bit_and_no_swap_escapes_the_checksum(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    size = torch.empty((), dtype=dtype).element_size()
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 3000 * size, dtype=np.uint8)
    tensor = torch.from_numpy(data).view(dtype).view(30, 100)
    sound = checksum(tensor)
    for byte, bit in zip(rng.integers(0, len(data), 500), rng.integers(0, 8, 500), strict=True):
        data[byte] ^= 1 << bit
        assert checksum(tensor) != sound, f"bit {bit} of byte {byte}"
        data[byte] ^= 1 << bit
    flat = tensor.flatten()
    for i, j in rng.integers(0, 3000, (500, 2)):
        if flat[i].item() != flat[j].item():
            swapped = flat.clone()
            swapped[i], swapped[j] = flat[j], flat[i]
            assert checksum(swapped) != sound
    assert checksum(tensor.t().contiguous().t()) == sound, "how it lies in memory does not matter"
    # A smaller portion than any tensor here: the sum must not depend on the portions.
    monkeypatch.setattr(guard, "HASHED_AT_ONCE", 7)
    assert checksum(tensor) == sound


def flip(tensor: Tensor, bit: int = 0) -> None:
    """Flip one bit of the last element of this rank's part."""
    local(tensor).detach().view(torch.int32).view(-1)[-1:].bitwise_xor_(1 << bit)


def corrupted(recipe: Recipe) -> None:
    """Two shards, each on two ranks: 0 and 2 hold the same, and so do 1 and 3."""
    bad = BadRank(rank=1, calls_per_step=2)
    with dist.setup(replicate=2, shard=2) as world:
        run, state = loop.build(recipe, world)
        guarded = Guard(recipe.guard, run.probe, lambda state: None, silent_log(recipe), world, recipe.steps)
        for _ in range(2):
            batch = run.data.batch(state.samples)
            state, _ = run.train_step(state, batch)
            state = guarded(state, batch)
        assert guarded.sound == "step 2"
        weight, moment = "blocks.1.mlp.w_up.weight", "embed.weight"
        for rank, tensor, bit, message in (
            (3, state.params[weight], 0, f"ranks 1 and 3 should hold the same bits and do not, first in {weight};"),
            (0, state.params[weight], 31, f"ranks 0 and 2 should hold the same bits and do not, first in {weight};"),
            (2, state.opt_state["exp_avg_sq"][moment], 7, f"ranks 0 and 2 .* first in {moment} \\(exp_avg_sq\\);"),
            (1, state.opt_state["step"][weight], 3, f"rank 1 of the 4 ranks .* first in {weight} \\(step\\)"),
        ):
            for turn in ("there", "and back"):
                if world.rank == rank:
                    flip(tensor, bit)
                if turn == "there":
                    with pytest.raises(ValueError, match=f"after step 2 {message}.* checkpoints since step 2"):
                        guarded.check_ranks(state, batch)
        guarded.check_ranks(state, batch)
        # From here on one rank computes another gradient each time.
        bad.gradient_at, bad.wrong = lambda step: True, 1e-6
        register_module_forward_hook(bad)
        with pytest.raises(
            ValueError, match="after step 2 rank 1 computed two gradients from the same weights and sam"
        ):
            guarded.check_ranks(state, batch)
        bad.gradient_at, bad.loss_at = lambda step: False, lambda step: True
        found = guard.find_bad(run.probe, state, batch)
        assert found == "the loss of rank 1 and the gradient of embed.weight, the first such parameter"
        bad.loss_at = lambda step: False
        assert guard.find_bad(run.probe, state, batch).startswith("nothing when it was computed again")


def test_a_flipped_bit_on_one_of_four_ranks_is_found_and_the_ranks_are_named(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, guard=GuardConfig(replicas_every=2))
    tiny.run_ranks(4, corrupted, recipe)


def split_ranks(recipe: Recipe) -> None:
    """A tensor is split between the two ranks, and each has a norm's weight whole."""
    with dist.setup(tensor=2) as world:
        run, state = loop.build(recipe, world)
        batch = run.data.batch(state.samples)
        state, _ = run.train_step(state, batch)
        assert guard.find_unlike(state) is None and guard.find_unrepeatable(run.probe, state, batch) is None
        if world.rank == 1:
            flip(state.params["blocks.0.mlp.w_up.weight"])  # its own part, which no other rank has
        assert guard.find_unlike(state) is None
        if world.rank == 1:
            flip(state.params["final_norm.weight"])
        problem = guard.find_unlike(state)
        assert problem and "ranks 0 and 1 should hold the same bits and do not, first in final_norm" in problem
        # Where one rank alone has a bad gradient, and each has its own sum of the losses, they still agree.
        norm = torch.tensor(math.nan if world.rank == 1 else 1.0)
        loss, is_bad = agreed(torch.tensor(2.0 + world.rank), norm, world)
        assert is_bad and loss == 2.0
        assert not agreed(torch.tensor(2.0), torch.ones(()), world)[1]


@pytest.mark.slow
def test_ranks_that_share_a_tensor_are_compared_where_they_hold_the_same(tmp_path: Path) -> None:
    tiny.run_ranks(2, split_ranks, tiny.recipe(tmp_path))
