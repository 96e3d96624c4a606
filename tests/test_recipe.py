"""Recipes: by name, from Python and JSON, with mistakes named; what a dry run foretells."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from modalities.config import from_dict, to_dict
from modalities.mixture import Stage
from modalities.model import build_skeleton, num_params
from modalities.optim import ScheduleConfig, decay_multiples
from modalities.recipe import Recipe, check_ranks, describe, load, memory_per_rank, parse

ROOT = Path(__file__).parents[1]


def test_a_recipe_may_say_what_python_lets_pass(tmp_path: Path) -> None:
    """Lists for tuples and whole numbers for floats come back from recipe.json as they went."""
    text = (Path(__file__).parents[1] / "recipes" / "demo.py").read_text()
    (tmp_path / "loose.py").write_text(text.replace("betas=(0.9, 0.99)", "betas=[0, 0.99]"))
    recipe, _ = load(str(tmp_path / "loose.py"))
    assert recipe.optim.betas == (0.0, 0.99) and from_dict(Recipe, to_dict(recipe)) == recipe
    (tmp_path / "wrong.py").write_text(text.replace("steps=900", "steps=9e2"))
    with pytest.raises(ValueError, match=r"wrong\.py: steps is 900\.0, but should be int"):
        load(str(tmp_path / "wrong.py"))


@pytest.mark.parametrize(
    "source, message",
    [
        ("from modalities.data import DataConfig\nDataConfig(train='a.pbin')", "must be a tuple: ('a.pbin',)"),
        ("recipe = 3", "defines no `recipe = Recipe"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("recipe = = 3", "SyntaxError"),
        ("from modalities.recipe import Recipe\nrecipe = Recipe(step=3)", "unexpected keyword argument 'step'"),
    ],
)
def test_a_broken_recipe_file_is_named(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "broken.py").write_text(source)
    with pytest.raises(ValueError, match="broken.py: |broken.py defines") as caught:
        load(str(tmp_path / "broken.py"))
    assert message in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"steps": 3}', '{"stepz": 3}'])
def test_a_broken_recipe_json_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(ValueError, match=r"recipe\.json"):
        load(str(tmp_path / "recipe.json"))


@pytest.mark.parametrize("before, now", [(True, "model"), (False, "off"), ("block", "block")])
def test_a_recipe_json_of_an_earlier_version_is_read(tmp_path: Path, before: bool | str, now: str) -> None:
    values = to_dict(tiny.recipe(tmp_path))
    values["parallel"]["compile"] = before
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    assert load(str(tmp_path / "recipe.json"))[0].parallel.compile == now
    values["parallel"]["compile"] = 1
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"recipe.json: parallel.compile is 1, but should be one of 'off', 'block', "):
        load(str(tmp_path / "recipe.json"))


def test_a_run_is_called_after_its_file() -> None:
    recipe, path = load("gpt2_60m")
    assert recipe.name == path.stem == "gpt2_60m" and recipe.folder == Path("runs/gpt2_60m")


def test_gpt2_60m_is_what_its_name_says() -> None:
    model = load("gpt2_60m")[0].model
    assert (model.num_layers, model.width, model.num_heads, model.mlp_hidden) == (10, 512, 8, 1536)
    assert model.padded_vocab_size == 50_304 and model.tied and num_params(model) == 59_845_120


@pytest.mark.parametrize("ranks, fits", [(1, True), (2, True), (4, True), (3, False), (8, False)])
def test_the_global_batch_must_be_cut_evenly(tmp_path: Path, ranks: int, fits: bool) -> None:
    recipe = tiny.recipe(tmp_path)  # 8 sequences in micro-batches of 2
    if fits:
        check_ranks(recipe, ranks)
    else:
        with pytest.raises(ValueError, match=f"data.global_batch 8 is not divisible by {ranks} rank"):
            check_ranks(recipe, ranks)


def test_impossible_combinations_are_refused(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    long = ScheduleConfig(kind="wsd", warmup=15, decay=10)
    with pytest.raises(ValueError, match="warmup 15 and decay 10 do not fit into the run's 20 steps"):
        replace(recipe, optim=replace(recipe.optim, schedule=long))
    with pytest.raises(ValueError, match="data.seq_len 65 is longer than model.max_seq_len 64"):
        replace(recipe, data=replace(recipe.data, seq_len=65))
    with pytest.raises(ValueError, match="name is 'a/b'"):
        replace(recipe, name="a/b")
    with pytest.raises(ValueError, match="steps is 0"):
        replace(recipe, steps=0)


def test_a_dry_run_tells_size_and_shape(tmp_path: Path) -> None:
    text = describe(tiny.recipe(tmp_path), ranks=2)
    assert f"parameters       {num_params(tiny.MODEL):,}" in text and "(2, 2, 32) a rank" in text


# Of each: parameters, tokens of a step, and ranks that its docstring counts on.
LARGE = {
    "gpt2_124m": (124_475_904, 2**19, 8),
    "llama_160m": (159_861_504, 2**19, 8),
    "llama_1b": (1_235_814_400, 2**21, 8),
    "llama_8b": (8_030_261_248, 2**22, 64),
    "qwen3_600m": (596_049_920, 2**20, 8),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_recipes_are_described_without_their_weights(name: str, tmp_path: Path) -> None:
    params, tokens_per_step, ranks = LARGE[name]
    path = tiny.write_tokens(tmp_path / "train.pbin", 20_000)
    recipe = parse(load(name)[0], ["--data.train", str(path)], "train.py")
    assert recipe.tokens_per_step == tokens_per_step
    assert 19 < recipe.steps * tokens_per_step / params < 81  # about 20 tokens a parameter; 10 billion for GPT-2
    check_ranks(recipe, ranks)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = describe(recipe, ranks)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10  # KiB
    micro, seq_len = recipe.parallel.micro_batch, recipe.data.seq_len
    assert micro != "auto"
    assert f"parameters       {params:,}\n" in text and "memory per rank  about " in text
    assert f"({tokens_per_step // ranks // micro // seq_len}, {micro}, {seq_len}) a rank" in text


@pytest.mark.parametrize("name", LARGE)
def test_decay_rules_fit_large_recipes(name: str) -> None:
    recipe, _ = load(name)
    names = [name for name, _ in build_skeleton(recipe.model).named_parameters()]
    multiples = decay_multiples(recipe.optim.decay_rules, names)
    assert multiples["embed.weight"] == multiples["blocks.0.attn.wq.weight"] == 1.0
    assert multiples["final_norm.weight"] == multiples.get("blocks.0.attn.wq.bias", 0.0) == 0.0


MEMORY = [("gpt2_124m", 1, 40), ("llama_160m", 1, 40), ("llama_1b", 8, 80), ("qwen3_600m", 8, 80), ("llama_8b", 8, 141)]


@pytest.mark.parametrize("name, ranks, gigabytes", MEMORY)
def test_large_recipes_fit_into_the_gpus_that_they_name(name: str, ranks: int, gigabytes: int) -> None:
    recipe, path = load(name)
    assert f"of {gigabytes} GB" in " ".join(path.read_text().split())
    assert sum(memory_per_rank(recipe, ranks).values()) < 0.9 * gigabytes * 1e9


def test_the_largest_is_dry_run_on_the_command_line(tmp_path: Path) -> None:
    tiny.write_tokens(tmp_path / "train.pbin", 20_000)
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--recipe",
        "llama_8b",
        "--dry-run",
        "--data.train",
        "train.pbin",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "64"}
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert "8,030,261,248" in shown and "MiB on 64 rank(s)" in shown and "(8, 1, 8192) a rank" in shown
    assert not list(tmp_path.glob("runs"))


def test_memory_is_shared_among_ranks_but_for_activations(tmp_path: Path) -> None:
    one, two, four = (memory_per_rank(tiny.recipe(tmp_path), ranks) for ranks in (1, 2, 4))
    assert one["optimizer"] == 8 * num_params(tiny.MODEL) == 2 * two["optimizer"] == 4 * four["optimizer"]
    assert two["activations"] == four["activations"] > 0
    replicated = tiny.recipe(tmp_path)
    replicated = replace(replicated, parallel=replace(replicated.parallel, replicate=2))
    assert memory_per_rank(replicated, 4)["optimizer"] == two["optimizer"]


@pytest.mark.parametrize(
    ("changes", "part", "sign"),
    [
        ({"activation_checkpointing": "full"}, "activations", -1),
        ({"micro_batch": 4}, "activations", 1),
        ({"sync_gradients": "last"}, "gradients", 1),
        ({"reshard_after_forward": False}, "parameters", 1),
        ({"param_dtype": "bfloat16"}, "activations", -1),
        ({"tensor": 2}, "activations", -1),
    ],
)
def test_each_knob_moves_the_memory_that_it_is_for(
    changes: dict[str, Any], part: str, sign: int, tmp_path: Path
) -> None:
    recipe = tiny.recipe(tmp_path, model=replace(tiny.MODEL, num_layers=4))
    before, after = (
        memory_per_rank(replace(recipe, parallel=replace(recipe.parallel, **fields)), 2)[part]
        for fields in ({}, changes)
    )
    assert sign * (after - before) > 0


def test_a_dry_run_with_a_searched_micro_batch_is_of_one_sequence(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    auto, one = (replace(recipe, parallel=replace(recipe.parallel, micro_batch=size)) for size in ("auto", 1))
    assert memory_per_rank(auto, 2) == memory_per_rank(one, 2)
    text = describe(auto, ranks=2)
    assert "parallel.micro_batch auto is searched when training starts: here with 1" in text
    assert "(4, 1, 32) a rank" in text


def test_every_size_of_a_ramp_must_be_cut_evenly(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    ramped = replace(recipe, data=replace(recipe.data, ramp=((1000, 16), (2000, 20))))
    check_ranks(ramped, 2)
    with pytest.raises(
        ValueError, match=r"data.ramp's 20 is not divisible by 4 rank\(s\) × parallel.micro_batch 2 = 8"
    ):
        check_ranks(ramped, 4)
    auto = replace(recipe, parallel=replace(recipe.parallel, micro_batch="auto"))
    with pytest.raises(ValueError, match=r"data.global_batch 8 is not divisible by 3 rank\(s\); change"):
        check_ranks(auto, 3)
    # Ranks of one tensor-parallel group read the same part of the batch.
    check_ranks(replace(recipe, parallel=replace(recipe.parallel, tensor=2)), 8)


def test_tokens_of_a_run_with_a_ramp(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    ramped = replace(recipe, steps=10, data=replace(recipe.data, ramp=((1000, 16),)))  # 1,000 tokens: 31.25 sequences
    assert ramped.tokens_after(4) == 4 * 256 and ramped.tokens_after(10) == 4 * 256 + 6 * 512
    assert ramped.tokens_of_steps == "256 to 512" and recipe.tokens_of_steps == "256"
    decay = ScheduleConfig(kind="wsd", unit="tokens", warmup=1000, decay=3100)
    with pytest.raises(ValueError, match="warmup 1000 and decay 3100 do not fit into the run's 4096 tokens"):
        replace(ramped, optim=replace(recipe.optim, schedule=decay))


def test_a_recipe_with_stages_is_loaded_overridden_and_written(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "recipes" / "demo.py").read_text()
    data = """data=DataConfig(
        train=("web.pbin", "code.pbin"), weights=(3, 1), seq_len=256, global_batch=8,
        stages=[Stage(tokens=10**6, weights=[1, 1]), Stage(tokens=2 * 10**6, weights=(0.0, 1.0))],
    )"""
    text = text.replace("data=DataConfig(seq_len=256, global_batch=8)", data)
    (tmp_path / "staged.py").write_text(
        text.replace(
            "from modalities.model import", "from modalities.mixture import Stage\nfrom modalities.model import"
        )
    )
    recipe, _ = load(str(tmp_path / "staged.py"))
    assert recipe.data.stages[1] == Stage(tokens=2 * 10**6, weights=(0.0, 1.0))
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe)))) == recipe
    changed = parse(
        recipe, ["--steps", "5", "--data.weights", "1", "2", "--data.stages.1.tokens", "7000000"], "train.py"
    )
    assert changed.data.stages == (recipe.data.stages[0], Stage(tokens=7_000_000, weights=(0.0, 1.0)))
    assert (changed.steps, changed.data.weights, changed.data.train) == (5, (1.0, 2.0), recipe.data.train)
    with pytest.raises(ValueError, match="tokens 5 come after 1000000, but must ascend"):
        parse(recipe, ["--data.stages.1.tokens", "5"], "train.py")


def test_flags_of_several_files(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    data = parse(
        recipe, ["--data.train", "a.pbin", "b.pbin", "--data.masks", "", "m.pbin", "--data.val"], "train.py"
    ).data
    assert (data.train, data.masks, data.val) == (("a.pbin", "b.pbin"), ("", "m.pbin"), ())
    with pytest.raises(ValueError, match="data.val has an empty entry; for none write"):
        parse(recipe, ["--data.val", ""], "train.py")


def test_a_dry_run_tells_what_is_taken_of_each_source(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    data = replace(recipe.data, train=(*recipe.data.train, *recipe.data.val), names=("web", "chat"), weights=(3, 1))
    text = describe(replace(recipe, data=replace(data, sampling="best_fit")), ranks=1)
    assert (
        "training data    web (best_fit): 125 sequences, 0.0% padding, 1 of 1 documents cut; 75.0% of the run" in text
    )
    assert "training data    chat (best_fit): 125 sequences" in text and "25.0% of the run, 0.32 epochs" in text
