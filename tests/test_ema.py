"""The running mean of the weights: what it is, that it is saved, goes on and is used, on one rank and on two."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models

from modalities import checkpoint, dist, ema, evaluate, generate, hf, log, loop, saving, trained
from modalities.ema import EmaConfig
from modalities.fingerprints import ResumeConfig
from modalities.fsdp import whole
from modalities.optim import OptimConfig, Params, ScheduleConfig, local
from modalities.recipe import Recipe, from_json, memory_per_rank

WORLD = dist.World(rank=0, size=1, device=torch.device("cpu"), mesh=None)
CPU = torch.device("cpu")
KEPT = EmaConfig(decay=0.8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run of 20 steps with checkpoints at 10 and 20, whose tokens are the words "0" to "99"."""
    folder = tmp_path_factory.mktemp("finished")
    tokenizer = Tokenizer(models.WordLevel({f"{i}": i for i in range(100)}, unk_token="0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    # So that the first ten steps are those of a run of ten.
    optim = OptimConfig(lr=1e-2, schedule=ScheduleConfig(kind="constant"))
    recipe = tiny.recipe(folder, name="a", ema=KEPT, optim=optim)
    recipe = replace(recipe, data=replace(recipe.data, tokenizer=str(folder / "tokenizer.json"), eod="0"))
    loop.train(recipe)
    return recipe


def load(recipe: Recipe, step: int, kind: str = "ema") -> Params:
    shapes = {name: p.shape for name, p in trained.build_skeleton(recipe.model).named_parameters()}
    params = {name: torch.empty(shape) for name, shape in shapes.items()}
    return checkpoint.load_params(checkpoint.path_of(recipe.folder, step), params, kind)


def assert_same_bits(one: Params, other: Params) -> None:
    assert one.keys() == other.keys() and len(one) > 10
    assert all(torch.equal(one[name], other[name]) for name in one)


def copy_until(recipe: Recipe, step: int, name: str) -> Recipe:
    """The same run under another name, as it was after `step`."""
    later = [path.name for path in recipe.folder.glob("step-*") if int(path.name[5:]) > step]
    shutil.copytree(recipe.folder, recipe.folder.with_name(name), ignore=shutil.ignore_patterns(*later))
    return replace(recipe, name=name)


@pytest.mark.parametrize("every", [1, 3])
def test_it_is_the_mean_of_a_runs_weights(tmp_path: Path, every: int) -> None:
    """Against float64, with the decay's warm-up; largest difference 1e-7 of a tensor's largest weight."""
    recipe = tiny.recipe(tmp_path, ema=EmaConfig(decay=0.8, every=every))
    run, state = loop.build(recipe, WORLD)
    expected = {name: param.double() for name, param in state.params.items()}
    for n in range(1, 13):
        state, _ = run.train_step(state, run.data.batch(state.samples))
        if n % every == 0:
            decay = min(0.8, (1 + n) / (10 + n)) ** every
            expected = {name: decay * m + (1 - decay) * state.params[name].double() for name, m in expected.items()}
    assert state.ema.keys() == state.params.keys()
    for name, mean in expected.items():
        assert state.ema[name].dtype == torch.float32
        assert (state.ema[name] - mean).abs().max() <= 1e-6 * mean.abs().max(), name
        assert (state.params[name] - mean).abs().max() > 1e-3 * mean.abs().max(), "it is not the weights"


def test_a_skipped_step_leaves_every_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randn(7, 5, generator=generator) for name in "ab"}
    means = {name: torch.randn(7, 5, generator=generator) for name in "ab"}
    before = {name: mean.clone() for name, mean in means.items()}
    config = EmaConfig(decay=0.9)
    ema.update(config, means, params, 100, torch.ones(()))
    assert all(torch.equal(means[name], before[name]) for name in "ab")
    ema.update(config, means, params, 100, torch.zeros(()))
    torch.testing.assert_close(means["a"], 0.9 * before["a"] + 0.1 * params["a"])
    assert ema.update(config, {}, params, 100) == {}


def test_without_it_nothing_is_kept(tmp_path: Path) -> None:
    _, state = loop.build(tiny.recipe(tmp_path), WORLD)
    assert state.ema == {}


def test_it_goes_on_to_the_bit(finished: Recipe) -> None:
    """10 steps, a new start and 10 more are 20 straight; and a rollback in a run brings it back."""
    again = copy_until(finished, 10, "again")
    loop.train(again)
    assert_same_bits(load(again, 20), load(finished, 20))
    run, state = loop.build(finished, WORLD)
    state, _ = run.train_step(state, run.data.batch(0))
    restored = checkpoint.restore(checkpoint.path_of(finished.folder, 10), state)
    assert_same_bits(restored.ema, load(finished, 10))


def test_both_losses_are_told(finished: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    """In metrics.jsonl and manifests; keep_best goes by the weights' own."""
    lines = [line for line in log.read_metrics(finished.folder) if "val/val/loss" in line]
    assert [line["step"] for line in lines] == [0, 10, 20]
    manifest = json.loads((checkpoint.path_of(finished.folder, 20) / checkpoint.MANIFEST).read_text())
    assert manifest["val"]["val"] == lines[-1]["val/val/loss"] == saving.mean_loss(manifest)
    assert manifest["val_ema"]["val"] == lines[-1]["val_ema/val/loss"]
    evaluate.main(finished.folder, samples=7, ema=True, json=True)
    told = json.loads(capsys.readouterr().out)["total"]["loss"]
    assert told == pytest.approx(lines[-1]["val_ema/val/loss"], rel=1e-6)
    assert told != pytest.approx(lines[-1]["val/val/loss"], rel=1e-3)


def test_it_is_exported_and_generates(finished: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf.export(finished.folder, out=tmp_path / "hf", ema=True)
    exported = trained.load(tmp_path / "hf", CPU).params
    mean = load(finished, 20)
    assert all(torch.equal(exported[name][:100], mean[name][:100]) for name in mean)  # the rest pads the vocabulary
    assert "running mean" in (tmp_path / "hf" / "README.md").read_text()
    capsys.readouterr()
    texts = []
    for args in ([str(finished.folder), "--ema"], [str(tmp_path / "hf")], [str(finished.folder)]):
        generate.run([*args, "--prompt", "7", "--num-tokens", "24", "--context", "32", "--json", "--seed", "1"])
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1] != texts[2]


def test_turning_it_on_later(finished: Recipe, tmp_path: Path) -> None:
    """It is refused by name, and with leave begins at the weights; a model without it has none to use."""
    plain = tiny.recipe(tmp_path, name="plain", steps=10)
    loop.train(plain)
    newest = checkpoint.path_of(plain.folder, 10)
    for use in (lambda: trained.find(newest, ema=True), lambda: hf.export(plain.folder, out=tmp_path / "x", ema=True)):
        with pytest.raises(ValueError, match=r"--ema: .*step-00000010 has no running mean .* leave --ema out"):
            use()
    later = replace(plain, steps=12, ema=KEPT)
    with pytest.raises(ValueError, match=r"begun with .*ema\.decay 0\.0, not 0\.8"):
        loop.train(later)
    with pytest.raises(ValueError, match=r"begun with .*ema\.decay 0\.8, not 0\.0"):
        loop.train(replace(finished, ema=EmaConfig()))
    _, state = loop.build(later, WORLD)
    restored = checkpoint.restore(newest, state)
    assert_same_bits(restored.ema, restored.params)
    loop.train(replace(later, resume=ResumeConfig(allow_changes=True)))
    mean, weights = load(later, 12), load(later, 12, "params")
    assert any(not torch.equal(mean[name], weights[name]) for name in mean)
    recipe = json.loads((plain.folder / "recipe-00000010.json").read_text())
    del recipe["ema"], recipe["noise"]
    (tmp_path / "old.json").write_text(json.dumps(recipe))
    assert from_json(tmp_path / "old.json") == plain


def test_memory_is_foretold(tmp_path: Path) -> None:
    """Four bytes a parameter, and as many in the copy that is being saved."""
    without = memory_per_rank(tiny.recipe(tmp_path), 1)
    kept = memory_per_rank(tiny.recipe(tmp_path, ema=KEPT), 1)
    assert kept["EMA"] == without["optimizer"] / 2
    assert kept["copy being saved"] - without["copy being saved"] == kept["EMA"]


@pytest.mark.parametrize(("field", "value"), [("decay", 1.0), ("decay", -0.1), ("decay", float("nan")), ("every", 0)])
def test_wrong_fields_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"ema\.{field} is {value}, but must be"):
        EmaConfig(**{field: value})  # type: ignore[arg-type]


class Broken(Exception):
    """What goes wrong in an evaluation."""


def sharded(recipe: Recipe, solo: Recipe) -> None:
    """On two ranks: the mean of one rank restored to the bit, evaluated, exchanged back after an error."""
    with dist.setup() as world:
        run, state = loop.build(recipe, world)
        state = checkpoint.restore(checkpoint.path_of(solo.folder, 20), state)
        expected = load(solo, 20)
        assert_same_bits({name: whole(mean) for name, mean in state.ema.items()}, expected)
        before = {name: local(param).clone() for name, param in state.params.items()}

        def broken() -> Iterator[bool]:
            raise Broken

        with pytest.raises(Broken), ema.as_weights(state.params, state.ema) as weights:
            assert_same_bits({name: whole(param) for name, param in weights.items()}, expected)
            next(broken())
        own, of_mean = loop.evaluate(run, state, lambda: False)
        facts = json.loads((checkpoint.path_of(solo.folder, 20) / checkpoint.MANIFEST).read_text())
        assert float(own["val"]) == pytest.approx(facts["val"]["val"], rel=1e-6)
        assert float(of_mean["val"]) == pytest.approx(facts["val_ema"]["val"], rel=1e-6)
        assert all(torch.equal(local(param), before[name]) for name, param in state.params.items())
        assert_same_bits({name: whole(mean) for name, mean in state.ema.items()}, expected)


def test_two_ranks_have_the_mean_of_one(finished: Recipe) -> None:
    """Largest difference after 10 steps 1e-6 of a tensor's largest weight, as that of the weights themselves."""
    two = replace(finished, name="two", steps=10)
    tiny.run_ranks(2, sharded, two, finished)
    tiny.run_ranks(2, loop.train, two)
    ours, theirs = load(two, 10), load(finished, 10)
    for name, mean in theirs.items():
        assert (ours[name] - mean).abs().max() <= 1e-5 * mean.abs().max(), name
    # And back: what two ranks have saved goes on in one process.
    _, state = loop.build(two, WORLD)
    assert_same_bits(checkpoint.restore(checkpoint.path_of(two.folder, 10), state).ema, ours)
