"""Means of weights against float64 by hand, of whatever kind the models are; what has no mean is refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from words import write_words

from modalities import checkpoint, hf, loop, trained
from modalities.checkpoint import CheckpointConfig
from modalities.config import to_dict
from modalities.model import ModelConfig, build_skeleton
from modalities.optim import Params
from modalities.recipe import Recipe, from_json
from modalities.step import EvalConfig, TrainState

CPU = torch.device("cpu")
VOCAB = {"<eod>": 0} | {chr(0x100 + i): i for i in range(1, 100)}


def random_params(config: ModelConfig, seed: int) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator) * 0.3 for n, p in build_skeleton(config).named_parameters()}


def write_run(run: Path, seed: int, config: ModelConfig = tiny.MODEL, step: int = 0) -> Params:
    """A checkpoint of random weights in a run, which has a tokenizer."""
    params = random_params(config, seed)
    base = tiny.recipe(run.parent, model=config)
    write_words(run.parent / "tokenizer.json", VOCAB)
    data = replace(base.data, tokenizer=str(run.parent / "tokenizer.json"), eod="<eod>")
    checkpoint.save(run, TrainState(params, {}, step), to_dict(replace(base, data=data)), is_main=True)
    return params


def by_hand(of: list[Params], weights: list[float]) -> Params:
    """In float64, rounded once."""
    return {
        name: torch.stack([w * p[name].double() for w, p in zip(weights, of, strict=True)]).sum(0).float()
        for name in of[0]
    }


def assert_holds(run: Path, expected: Params, rows: int | None = None) -> None:
    """To a unit in the last place: the order of a sum in float64 may decide a tie. `rows`: of the vocabulary."""
    found = trained.load(run, CPU).params
    assert found.keys() == expected.keys()
    for name, param in expected.items():
        count = rows if name in ("embed.weight", "head.weight") else None
        torch.testing.assert_close(found[name][:count], param[:count], rtol=1.2e-7, atol=0)


def test_the_mean_is_that_of_float64_rounded_once(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in "abc"]
    params = [write_run(run, seed) for seed, run in enumerate(runs)]
    out = ["--out", str(tmp_path / "out")]
    hf.main(["average", *map(str, runs), "--weights", "0.5", "0.3", "0.2", *out])
    assert_holds(tmp_path / "out", by_hand(params, [0.5, 0.3, 0.2]))
    hf.main(["average", *map(str, runs), "--out", str(tmp_path / "even")])
    assert_holds(tmp_path / "even", by_hand(params, [1 / 3] * 3))
    hf.main(["average", *map(str, runs), "--weights", "1", "0.5", "-0.5", "--out", str(tmp_path / "task")])
    assert_holds(tmp_path / "task", by_hand(params, [1.0, 0.5, -0.5]))


def test_the_last_checkpoints_of_a_run_and_what_becomes_of_the_mean(tmp_path: Path) -> None:
    """It exports, its export can be averaged as well, and training goes on from it."""
    params = [write_run(tmp_path / "run", step, step=step) for step in (10, 20, 30)]
    hf.main(["average", str(tmp_path / "run"), "--last", "2", "--out", str(tmp_path / "tail")])
    tail = by_hand(params[1:], [0.5, 0.5])
    assert_holds(tmp_path / "tail", tail)

    hf.export(tmp_path / "tail", tmp_path / "exported")
    pair = [str(tmp_path / "exported"), str(tmp_path / "run" / "step-00000010")]
    hf.main(["average", *pair, "--weights", "0.25", "0.75", "--out", str(tmp_path / "soup")])
    assert_holds(tmp_path / "soup", by_hand([tail, params[0]], [0.25, 0.75]), rows=100)

    found = from_json(tmp_path / "tail" / "recipe.json")
    assert (found.name, found.model_from) == ("tail", str(tmp_path / "tail"))
    assert Path(found.data.tokenizer) == tmp_path / "tail" / "tokenizer.json" and Path(found.data.tokenizer).is_file()
    on: dict[str, Any] = {"steps": 1, "checkpoint": CheckpointConfig(every=0), "eval": EvalConfig(every=0)}
    rate = replace(found.optim, lr=0.0)
    run = loop.train(replace(found, name="on", optim=rate, **on))
    assert_holds(run, tail)


def refused(tmp_path: Path, *args: str) -> str:
    with pytest.raises(ValueError) as caught:
        hf.main(["average", *args, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists() and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"width": 64},
            r"model.width is 32 in .*a.step-00000000, but 64 in .*b.step-00000000; only weights of the same",
        ),
        ({"norm": "layernorm"}, "model.norm is rmsnorm in"),
        ({"rope_theta": 5e5}, "model.rope_theta is 10000.0 in"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    write_run(tmp_path / "a", 0)
    write_run(tmp_path / "b", 1, replace(tiny.MODEL, **changes))
    assert re.search(problem, refused(tmp_path, str(tmp_path / "a"), str(tmp_path / "b")))


def test_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    """Of what may differ, only a table of positions shows in the weights."""
    config = replace(tiny.MODEL, positions="learned")
    write_run(tmp_path / "a", 0, config)
    write_run(tmp_path / "b", 1, replace(config, max_seq_len=128))
    problem = refused(tmp_path, str(tmp_path / "a"), str(tmp_path / "b"))
    assert "positions.weight is [64, 32] in" in problem and "but [128, 32] in" in problem


def test_what_does_not_show_in_the_weights_may_differ(tmp_path: Path) -> None:
    params = [write_run(tmp_path / "a", 0), write_run(tmp_path / "b", 1, replace(tiny.MODEL, head_dim=8, init_std=0.1))]
    hf.main(["average", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out")])
    assert_holds(tmp_path / "out", by_hand(params, [0.5, 0.5]))


def test_impossible_requests(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0)
    a = str(tmp_path / "a")
    assert refused(tmp_path, a, a, "--weights", "0.5", "0.6") == "--weights add up to 1.1, but must add up to 1"
    assert "--weights has 1 number(s) for 2 model(s)" in refused(tmp_path, a, a, "--weights", "1")
    assert f"{a} has 1 checkpoint(s), but --last is 2" in refused(tmp_path, a, "--last", "2")
    assert "checkpoints of one run, but 2 models" in refused(tmp_path, a, a, "--last", "1")
    assert "--last is -1" in refused(tmp_path, a, "--last", "-1")
    assert "holds no checkpoint" in refused(tmp_path, a, str(tmp_path / "nothing"))
    assert "add up to nan" in refused(tmp_path, a, a, "--weights", "nan", "0.5")
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match=r"exists already"):
        hf.main(["average", a, "--out", str(tmp_path / "there")])


def test_a_recipe_is_kept(tmp_path: Path) -> None:
    """But for its name, its place, where its weights come from, and its tokenizer."""
    write_run(tmp_path / "a", 0)
    hf.main(["average", str(tmp_path / "a"), "--out", str(tmp_path / "out")])
    old: Recipe = from_json(tmp_path / "a" / "step-00000000" / "recipe.json")
    new = from_json(tmp_path / "out" / "recipe.json")
    data = replace(old.data, tokenizer=str(tmp_path / "out" / "tokenizer.json"))
    log = replace(old.log, dir=str(tmp_path))
    assert new == replace(old, name="out", model_from=str(tmp_path / "out"), data=data, log=log)
