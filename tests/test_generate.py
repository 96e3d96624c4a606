"""Generation: a model that has learnt a rule goes on by it; one text on one rank and on two; seeds, stops, context."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models

from modalities import dist, generate, loop
from modalities.checkpoint import CheckpointConfig
from modalities.generate import SampleConfig, load, load_tokenizer, make_logits_fn
from modalities.recipe import Recipe

CPU = torch.device("cpu")


def write_tokenizer(path: Path, size: int = 100) -> Path:
    """Token i is the text `<i>`."""
    tokenizer = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(size)}, unk_token="<0>"))
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on data in which x is mostly followed by 7x + 3 modulo 100."""
    folder = tmp_path_factory.mktemp("trained")
    return loop.train(tiny.recipe(folder, steps=150, checkpoint=CheckpointConfig(every=0)))


def continuation(run: Path, prompt: list[int], n: int, temperature: float = 0.0, **options: int | None) -> list[int]:
    loaded = load(run, CPU)
    logits_fn = make_logits_fn(loaded.model, loaded.params, torch.float32)
    settings = {"context": 32, "seed": 0, "stop": None, **options}
    return list(generate.generate(logits_fn, prompt, n, temperature, device=CPU, **settings))  # type: ignore[arg-type]


def test_a_model_goes_on_by_the_rule_that_it_learnt(trained: Path) -> None:
    tokens = [5, *continuation(trained, [5], 40)]
    rule = [(7 * a + 3) % 100 == b for a, b in zip(tokens, tokens[1:], strict=False)]
    assert sum(rule) >= 36  # beyond its context of 32 too


def test_greedy_text_has_one_outcome_and_sampled_text_one_a_seed(trained: Path) -> None:
    assert continuation(trained, [5], 20) == continuation(trained, [5], 20, seed=1)
    hot = [continuation(trained, [5], 20, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]


def test_it_ends_before_the_stop_token(trained: Path) -> None:
    tokens = continuation(trained, [5], 20)
    assert continuation(trained, [5], 20, stop=tokens[4]) == tokens[: tokens.index(tokens[4])]


def test_only_the_last_tokens_of_the_context_are_seen(trained: Path) -> None:
    assert continuation(trained, [9] * 60 + [5], 1, context=1) == continuation(trained, [5], 1, context=1)


def test_no_padding_token_is_ever_drawn(trained: Path) -> None:
    assert max(continuation(trained, [5], 300, temperature=1e6)) < 100


def sample_on(recipe: Recipe, out: Path) -> None:
    with dist.setup() as world:
        run, state = loop.build(recipe, world)
        text = run.sample(state.params, 1)
        again = run.sample(state.params, 1)
        assert text is not None and text == again
        if world.is_main:
            out.write_text(text)


def test_the_same_text_on_one_rank_and_on_two(tmp_path: Path) -> None:
    base = tiny.recipe(tmp_path, sample=SampleConfig(every=1, prompt="<7>", num_tokens=12, temperature=1.0))
    tokenizer = str(write_tokenizer(tmp_path / "tokenizer.json"))
    recipe = replace(base, data=replace(base.data, tokenizer=tokenizer))
    sample_on(recipe, tmp_path / "one.txt")
    tiny.run_ranks(2, sample_on, recipe, tmp_path / "two.txt")
    assert (tmp_path / "one.txt").read_text() == (tmp_path / "two.txt").read_text() != ""


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json", size=101)
    with pytest.raises(ValueError, match=r"has token 100, but model\.vocab_size is 100"):
        load_tokenizer(path, 100)
    with pytest.raises(ValueError, match=r"none\.json is missing"):
        load_tokenizer(tmp_path / "none.json", 100)
