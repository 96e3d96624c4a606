"""The loop: a run resumed, repeated or spread over ranks is the same run."""

import gc
import json
import math
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import tiny
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.profiler import ProfilerActivity, profile, record_function

from modalities import checkpoint, devices, dist, families, loop, profiling, trained
from modalities import recipe as recipes
from modalities.compiling import compile_seconds, compiled
from modalities.config import from_dict
from modalities.data import TrainData
from modalities.fsdp import ParallelConfig
from modalities.log import Log, LogConfig, Progress, read_metrics
from modalities.mixture import Stage
from modalities.model import ModelConfig, flops_per_token
from modalities.pbin import open_pbin, write_pbin
from modalities.recipe import Recipe

DROPOUT = replace(tiny.MODEL, embed_dropout=0.1, attn_dropout=0.1, resid_dropout=0.1)


def train(recipe: Recipe) -> None:
    loop.train(recipe)


def train_on(ranks: int, recipe: Recipe) -> Path:
    if ranks == 1:
        train(recipe)
    else:
        tiny.run_ranks(ranks, train, recipe)
    return recipe.folder


def weights(folder: Path, step: int = 20) -> dict[str, torch.Tensor]:
    path = folder / f"step-{step:08}"
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(tensor.size)
        for name, tensor in metadata.items()
        if name.startswith("params.") and isinstance(tensor, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert len(first) > 10 and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


@pytest.mark.parametrize("ranks", [1, 2])
def test_ten_steps_and_ten_more_are_twenty_to_the_bit(tmp_path: Path, ranks: int) -> None:
    recipe = tiny.recipe(tmp_path, model=DROPOUT)
    straight = train_on(ranks, recipe)
    # A run that ended after its checkpoint at step 10.
    shutil.copytree(straight, tmp_path / "runs" / "resumed", ignore=shutil.ignore_patterns("step-00000020"))
    resumed = train_on(ranks, replace(recipe, name="resumed"))
    assert_same_weights(straight, resumed)
    assert losses(straight) == losses(resumed)
    logged = [json.loads(line)["step"] for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert logged.count(11) == 2, "the resumed run started at step 10 and not anew"


@pytest.mark.slow
def test_the_default_precision_and_compilation_resume_to_the_bit_too(tmp_path: Path) -> None:
    parallel = ParallelConfig(micro_batch=4, param_dtype="bfloat16", compile="model")
    recipe = tiny.recipe(tmp_path, model=DROPOUT, parallel=parallel, data=replace(tiny.recipe(tmp_path).data, val=()))
    straight = train_on(1, recipe)
    shutil.copytree(straight, tmp_path / "runs" / "resumed", ignore=shutil.ignore_patterns("step-00000020"))
    assert_same_weights(straight, train_on(1, replace(recipe, name="resumed")))


def test_one_and_two_ranks_are_the_same_run(tmp_path: Path) -> None:
    one = train_on(1, tiny.recipe(tmp_path, name="one"))
    two = train_on(2, tiny.recipe(tmp_path, name="two"))
    assert len(losses(one)) == 20
    torch.testing.assert_close(losses(two), losses(one), rtol=1e-5, atol=0)
    val = [[line["val/val/loss"] for line in read_metrics(run) if "val/val/loss" in line] for run in (one, two)]
    torch.testing.assert_close(val[0], val[1], rtol=1e-5, atol=0)


def mixed_recipe(folder: Path, name: str) -> Recipe:
    """Two sources in packed documents that are kept apart, half of one's targets masked, and weights that change."""
    recipe = tiny.recipe(folder, name=name, model=DROPOUT)
    for source, seed, length in (("web", 2, 11), ("chat", 3, 40)):
        path = folder / f"{source}.pbin"
        if not path.exists():
            tokens = np.random.default_rng(seed).integers(0, 100, (100, length))
            with write_pbin(path, 100) as append, write_pbin(folder / f"{source}_mask.pbin", 2) as append_mask:
                for document in tokens:
                    append(document)
                    append_mask(document % 2)
    data = replace(
        recipe.data,
        train=(str(folder / "web.pbin"), str(folder / "chat.pbin")),
        weights=(3, 1),
        stages=(Stage(tokens=32 * 8 * 12, weights=(0, 1)),),
        masks=("", str(folder / "chat_mask.pbin")),
        val=(str(folder / "val.pbin"), str(folder / "chat.pbin")),
        val_masks=("", str(folder / "chat_mask.pbin")),
        sampling="best_fit",
        document_mask=True,
    )
    return replace(recipe, data=data)


def test_a_mixture_resumes_to_the_bit_and_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    recipe = mixed_recipe(tmp_path, "straight")
    straight = train_on(1, recipe)
    shutil.copytree(straight, tmp_path / "runs" / "resumed", ignore=shutil.ignore_patterns("step-00000020"))
    assert_same_weights(straight, train_on(1, replace(recipe, name="resumed")))
    plain = replace(recipe, model=tiny.MODEL)
    one, two = train_on(1, replace(plain, name="one")), train_on(2, replace(plain, name="two"))
    for name in ("loss", "loss/web", "loss/chat", "val/val/loss", "val/chat/loss"):
        curves = [[(line["step"], line[name]) for line in read_metrics(run) if name in line] for run in (one, two)]
        assert curves[0] and [step for step, _ in curves[0]] == [step for step, _ in curves[1]]
        torch.testing.assert_close(*([value for _, value in curve] for curve in curves), rtol=1e-5, atol=0)
    web = [line["step"] for line in read_metrics(one) if "loss/web" in line]
    assert web == list(range(1, 13)), "the second stage has nothing of it"


def test_micro_batches_are_the_same_run(tmp_path: Path) -> None:
    base = tiny.recipe(tmp_path)
    runs = [
        train_on(1, replace(base, name=f"m{micro}", parallel=replace(base.parallel, micro_batch=micro)))
        for micro in (8, 4, 2)
    ]
    for run in runs[1:]:
        torch.testing.assert_close(losses(run), losses(runs[0]), rtol=1e-5, atol=0)


def test_a_run_learns_and_leaves_what_the_design_lists(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, steps=60, checkpoint=checkpoint.CheckpointConfig(every=0))
    folder = train_on(1, recipe)
    assert losses(folder)[0] == pytest.approx(math.log(100), abs=0.1) and losses(folder)[-1] < 2.5
    found = {path.name for path in folder.iterdir()}
    assert found >= {"recipe.json", "environment.json", "metrics.jsonl", "loss.png", "step-00000060"}
    assert from_dict(Recipe, json.loads((folder / "recipe.json").read_text())) == recipe
    line = next(line for line in read_metrics(folder) if line["step"] == 60 and "loss" in line)
    assert line["samples"] == 480 and line["tokens"] == 480 * 32
    assert {"lr", "grad_norm", "tokens_per_s"} <= line.keys()


def val_losses(folder: Path) -> list[float]:
    return [line["val/val/loss"] for line in read_metrics(folder) if "val/val/loss" in line]


def hugging_face_folder(trained_run: Path, out: Path) -> Path:
    """The model of a run as a Hugging Face folder."""
    found = trained.load(trained_run, torch.device("cpu"))
    out.mkdir()
    (out / "config.json").write_text(json.dumps(families.config_to_hf(found.config)))
    tensors = {
        name: stored.join([found.params[ours] for ours in stored.rows])
        for name, stored in families.layout(found.config).items()
    }
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_starts_from_the_weights_of_another(tmp_path: Path, ranks: int) -> None:
    first = train_on(1, tiny.recipe(tmp_path))
    folder = hugging_face_folder(first, tmp_path / "hf")
    for i, source in enumerate((first, folder, first / "step-00000020")[: 4 - ranks]):
        recipe = tiny.recipe(tmp_path, name=f"more-{i}")
        recipe = recipes.start_from(recipe, source, recipe.folder)
        more = train_on(ranks, recipe)
        assert val_losses(more)[0] == pytest.approx(val_losses(first)[-1], rel=1e-5)
        assert val_losses(more)[-1] < val_losses(first)[-1]


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    first = train_on(1, tiny.recipe(tmp_path))
    wider = tiny.recipe(tmp_path, name="wide", model=replace(tiny.MODEL, mlp_width=64), model_from=str(first))
    with pytest.raises(ValueError, match=r"model.mlp_width is 64, but the weights of model_from .* are for 48; leave"):
        train(wider)
    # Heads cut otherwise have weights of the same shapes.
    heads = replace(tiny.MODEL, num_heads=8, num_kv_heads=4, head_dim=4)
    with pytest.raises(ValueError, match=r"model.num_heads is 8, but the weights"):
        recipes.dry_run(replace(wider, model=heads))
    with pytest.raises(ValueError, match="no-such holds no checkpoint; give a run"):
        recipes.start_from(wider, tmp_path / "no-such", wider.folder)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    folder = train_on(1, recipe)
    before = (folder / "metrics.jsonl").read_bytes()
    train_on(1, recipe)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_another_recipe_does_not_continue_a_run(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, steps=2)
    folder = train_on(1, recipe)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    changed = replace(recipe, optim=replace(recipe.optim, lr=0.5))
    with pytest.raises(ValueError, match=r"begun with optim\.lr 0\.01, not 0\.5"):
        train_on(1, changed)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    train_on(1, replace(recipe, log=replace(recipe.log, every=5)))  # what does not change weights may differ


@pytest.mark.parametrize(
    "model, message",
    [
        (replace(tiny.MODEL, vocab_size=50), "vocab_size is 50"),
        (replace(tiny.MODEL, vocab_size=50, num_layers=1), "model.vocab_size"),
    ],
)
def test_data_that_cannot_be_used_leaves_no_folder(tmp_path: Path, model: ModelConfig, message: str) -> None:
    recipe = tiny.recipe(tmp_path, model=model)
    with pytest.raises(ValueError, match=message):
        train_on(1, recipe)
    assert not recipe.folder.exists()


def refuse(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="token 99, but model.vocab_size is 99"):
        loop.train(recipe)


def test_bad_data_on_one_rank_is_refused_by_all_and_leaves_no_folder(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    # With this seed the sequence that holds the token goes to the second rank's part of the first batch.
    with dist.setup() as world:
        _, numbers = TrainData(recipe.data, 100, recipe.seed, 2, replace(world, rank=1, size=2)).order(0)
    tokens = open_pbin(tmp_path / "train.pbin").tokens.astype(np.int64) % 99
    tokens[numbers[0] * 32 + 5] = 99
    with write_pbin(tmp_path / "bad.pbin", 100) as append:
        append(tokens)
    model = replace(tiny.MODEL, vocab_size=99)
    recipe = replace(recipe, model=model, data=replace(recipe.data, train=(str(tmp_path / "bad.pbin"),), val=()))
    tiny.run_ranks(2, refuse, recipe)
    assert not recipe.folder.exists()


def test_a_line_that_a_killed_run_broke_off_does_no_harm(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    folder = train_on(1, recipe)
    shutil.rmtree(folder / "step-00000020")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "sam')
    train_on(1, recipe)
    assert len(losses(folder)) == 20 and (folder / "step-00000020").exists()


# What makes the host wait for the device: a number read, or a shape that depends on data.
SYNCS = (
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::equal",
)  # fmt: skip


def unlogged_steps(recipe: Recipe, world: dist.World) -> Iterator[None]:
    """Steps of the loop that are not logged, each when the next is asked for; three before the first."""
    run, state = loop.build(recipe, world)
    progress = Progress(100, recipe.data.global_batch, recipe.data.seq_len, 1, None, asynchronous=True)
    out = Log(None, LogConfig(every=100), progress, {})
    while True:
        state, metrics = run.train_step(state, run.data.batch(state.samples))
        out.train(state.step, state.samples, metrics)
        if state.step >= 3:
            yield


@pytest.mark.parametrize("mixed", [False, True])
def test_a_step_that_is_not_logged_reads_nothing_from_the_device(tmp_path: Path, mixed: bool) -> None:
    recipe = mixed_recipe(tmp_path, "mixed") if mixed else tiny.recipe(tmp_path)
    with dist.setup() as world:
        steps = unlogged_steps(recipe, world)
        next(steps)
        with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("step 1"):
            for _ in range(3):
                next(steps)
    paths = [path for path, _ in profiling.spans(profiler.events(), range(1, 2), on_gpu=False)]
    # On a CPU the fused kernel reads its count of steps, which is in the host's memory then; on a GPU it does not.
    names = [path[-1] for path in paths if "aten::_fused_adamw_" not in path]
    assert len(names) > 1000 and "aten::mm" in names and "batch" in names and "optimizer" in names
    assert not [name for name in names if name in SYNCS]


# It asks CUDA itself for waits; the test above counts them on a CPU, where nothing else can be asked.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("compile", ["off", "model"])
def test_a_step_that_is_not_logged_does_not_wait_for_the_gpu(tmp_path: Path, compile: Literal["off", "model"]) -> None:
    recipe = tiny.recipe(tmp_path, parallel=ParallelConfig(micro_batch=2, compile=compile))
    with dist.setup() as world:
        steps = unlogged_steps(recipe, world)
        next(steps)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                next(steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_garbage_is_collected_at_the_same_steps_and_as_python_likes_afterwards() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    alive = []
    with pytest.raises(KeyError), loop.garbage_collected_together(every=5) as collect:
        for step in range(1, 12):
            last = weakref.ref(Cycle())
            # As many objects as would make Python collect by itself.
            assert step == 1 or len([Cycle() for _ in range(3000)]) and last() is not None
            collect(step)
            alive.append(last() is not None)
        raise KeyError
    assert [step for step, lives in enumerate(alive, 1) if not lives] == [1, 5, 10]
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_line_tells_memory_and_the_share_of_the_peak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train_on(1, tiny.recipe(tmp_path, steps=3))
    lines = [line for line in read_metrics(folder) if "loss" in line]
    assert all(1e8 < line["peak_memory"] < 1e10 and line["compile_s"] >= 0 for line in lines)
    assert 0 < lines[-1]["mfu"] < 1
    flops = lines[-1]["tokens_per_s"] * flops_per_token(tiny.MODEL, 32)
    peak = devices.peak_flops(torch.device("cpu"), torch.float32)
    assert lines[-1]["mfu"] == pytest.approx(flops / peak)
    assert "GiB" in capsys.readouterr().out


@tiny.needs_compiler
def test_what_was_compiled_before_a_run_is_not_its_own(tmp_path: Path) -> None:
    compiled(lambda x: x.sin() + 1)(torch.ones(3))
    assert compile_seconds() > 0
    folder = train_on(1, tiny.recipe(tmp_path, steps=2))
    assert [line["compile_s"] for line in read_metrics(folder) if "loss" in line] == [0, 0]


def without_file_on_one(recipe: Recipe) -> None:
    """One rank of a run lacks a file, and all say so."""
    missing = (str(Path(recipe.log.dir) / "missing.pbin"),)
    with dist.setup() as world:
        for data in (replace(recipe.data, train=missing), replace(recipe.data, val=missing)):
            own = replace(recipe, data=data) if world.rank == 1 else recipe
            with pytest.raises(ValueError, match="missing.pbin is missing"), dist.all_or_none():
                loop.build(own, world)


def test_a_file_that_one_rank_lacks_keeps_no_rank_waiting(tmp_path: Path) -> None:
    """Shards that are kept for two of four ranks have groups of their own, which all four ranks make."""
    recipe = tiny.recipe(tmp_path)
    recipe = replace(recipe, parallel=replace(recipe.parallel, reshard_after_forward=2))
    tiny.run_ranks(4, without_file_on_one, recipe)


def test_a_first_step_waits_for_no_writer_and_the_compilers_programs_are_kept(tmp_path: Path) -> None:
    code = (
        "import os, sys, tiny; from pathlib import Path; from modalities import dist, loop\n"
        "with dist.setup() as world:\n"
        f"    run, state = loop.build(tiny.recipe(Path({str(tmp_path)!r})), world)\n"
        "    run.train_step(state, run.data.batch(0))\n"
        "print(os.environ['TORCHINDUCTOR_CACHE_DIR'], *sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    place, *loaded = done.stdout.split()
    assert place == f"{tmp_path}/modalities/inductor" and "modalities.checkpoint" in loaded
    assert not [name for name in loaded if name.startswith(("torch.distributed.checkpoint", "tensorboard"))]
