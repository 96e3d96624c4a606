"""Generation: a cache changes nothing, a row is as if alone, draws are transformers', text is whole characters."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from modalities import dist, fsdp, generate, loop
from modalities.checkpoint import CheckpointConfig
from modalities.generate import Continuation, Decoder, GenerateConfig, SampleConfig, make_decoder
from modalities.model import ModelConfig, build_skeleton
from modalities.recipe import Recipe
from modalities.trained import load

CPU = torch.device("cpu")
GREEDY = GenerateConfig(num_tokens=40, temperature=0.0)
VARIED = replace(GREEDY, repetition_penalty=1.3)  # a random model would soon repeat itself
SAMPLED = GenerateConfig(num_tokens=40, temperature=1.5, top_k=50, top_p=0.98, min_p=0.001, repetition_penalty=1.1)


def write_tokenizer(path: Path, size: int = 100) -> Path:
    """Token i is the text `<i>`."""
    tokenizer = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(size)}, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(">", "merged_with_previous")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path))
    return path


def bytes_tokenizer() -> Tokenizer:
    """A token a byte, as in GPT-2: a character beyond ASCII takes several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet))
    return tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on data in which x is mostly followed by 7x + 3 modulo 100, with a tokenizer."""
    folder = tmp_path_factory.mktemp("trained")
    base = tiny.recipe(folder, steps=150, checkpoint=CheckpointConfig(every=0))
    tokenizer = write_tokenizer(folder / "tokenizer.json")
    return loop.train(replace(base, data=replace(base.data, tokenizer=str(tokenizer), eod="<99>")))


def learnt(run: Path) -> Decoder:
    loaded = load(run, CPU)
    return make_decoder(loaded.model, loaded.params, torch.float32, CPU)


def random_decoder(config: ModelConfig, seed: int = 0) -> Decoder:
    """A model of large random weights, whose text is therefore far from monotonous."""
    model, generator = build_skeleton(config), torch.Generator().manual_seed(seed)
    params = fsdp.init_params(model, seed, CPU)
    params = {name: p + 0.15 * torch.randn(p.shape, generator=generator) for name, p in params.items()}
    return make_decoder(model, params, torch.float32, CPU)


def rows(
    decoder: Decoder,
    prompts: list[list[int]],
    config: GenerateConfig = GREEDY,
    context: int = 32,
    is_over: Callable[[int, int], bool] = lambda row, token: False,
    **options: Any,
) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in prompts]
    for new in generate.generate(decoder, prompts, config, context, is_over, **options):
        for row, token in new.items():
            out[row].append(token)
    return out


def some_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(100, (n,), generator=generator).tolist() for n in lengths]


# ------------------------------------------------------------------------------------------------------ what it writes


def test_a_model_goes_on_by_the_rule_that_it_learnt(trained: Path) -> None:
    tokens = [5, *rows(learnt(trained), [[5]])[0]]
    rule = [(7 * a + 3) % 100 == b for a, b in zip(tokens, tokens[1:], strict=False)]
    assert sum(rule) >= 36  # beyond its context of 32 too


def test_greedy_text_has_one_outcome_and_sampled_text_one_a_seed(trained: Path) -> None:
    decoder = learnt(trained)
    assert rows(decoder, [[5]]) == rows(decoder, [[5]], replace(GREEDY, seed=1))
    hot = [rows(decoder, [[5]], GenerateConfig(num_tokens=20, temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]


def test_a_row_ends_before_the_token_at_which_it_is_over(trained: Path) -> None:
    decoder = learnt(trained)
    whole = rows(decoder, [[5], [6]])
    ended = rows(decoder, [[5], [6]], is_over=lambda row, token: row == 0 and token == whole[0][4])
    assert ended == [whole[0][: whole[0].index(whole[0][4])], whole[1]]


def test_only_the_last_tokens_of_the_context_are_seen(trained: Path) -> None:
    decoder, one = learnt(trained), replace(GREEDY, num_tokens=1)
    assert rows(decoder, [[9] * 60 + [5]], one, context=1) == rows(decoder, [[5]], one, context=1)


def test_no_padding_token_is_ever_drawn(trained: Path) -> None:
    hottest = GenerateConfig(num_tokens=300, temperature=1e6)
    assert max(rows(learnt(trained), [[5]], hottest)[0]) < 100


def test_a_tiny_temperature_is_greedy(trained: Path) -> None:
    decoder = learnt(trained)
    assert rows(decoder, [[5]], replace(GREEDY, temperature=1e-30)) == rows(decoder, [[5]])


def test_a_diverged_model_says_so() -> None:
    model = build_skeleton(tiny.MODEL)
    params = {name: torch.full(p.shape, torch.nan) for name, p in model.named_parameters()}
    decoder = make_decoder(model, params, torch.float32, CPU)
    with pytest.raises(ValueError, match="logits are not finite"):
        rows(decoder, [[5]])


# ---------------------------------------------------------------------------------------------------- cache and batches

UNTIED = replace(tiny.MODEL, tied=False)
MODELS = {
    "rope, GQA": UNTIED,
    "learned": replace(UNTIED, positions="learned", norm="layernorm", bias=True, activation="gelu"),
    "sliding window": replace(UNTIED, window=7),
    "no positions, capped": replace(UNTIED, positions="none", logit_softcap=5.0, qk_norm=True),
}


@pytest.mark.parametrize("how", (VARIED, SAMPLED), ids=("greedy", "sampled"))
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_cache_changes_no_token(model: ModelConfig, how: GenerateConfig) -> None:
    decoder = random_decoder(model)
    # Rows of one length; of several; of which some outgrow the context of 32, at different times; or begin beyond it.
    for lengths in ((4,), (6, 6), (3, 11, 1), (30, 5, 17), (50, 32, 33)):
        prompts = some_prompts(*lengths)
        cached, anew = (rows(decoder, prompts, how, use_cache=use_cache) for use_cache in (True, False))
        assert cached == anew
        assert all(len(row) == 40 and len(set(row)) > 5 for row in cached)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_logits_with_the_cache_equal_those_without(model: ModelConfig) -> None:
    decoder, (first, second) = random_decoder(model), some_prompts(20, 20)
    tokens_BT = torch.tensor([first, second])
    cache = decoder.new_cache(2, 20)
    for end in (9, *range(10, 21)):
        step = decoder.next_logits(tokens_BT[:, cache.length : end], cache=cache)
        torch.testing.assert_close(step, decoder.next_logits(tokens_BT[:, :end]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", (VARIED, SAMPLED), ids=("greedy", "sampled"))
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_row_is_what_its_prompt_gives_alone(model: ModelConfig, how: GenerateConfig) -> None:
    decoder, prompts = random_decoder(model), some_prompts(3, 30, 17, 40)
    together = rows(decoder, prompts, how)
    assert together == [rows(decoder, [prompt], how, first_row=i)[0] for i, prompt in enumerate(prompts)]


def test_rows_that_are_over_leave_the_others_as_they_are() -> None:
    decoder, prompts, how = random_decoder(UNTIED), some_prompts(29, 4, 12), replace(GREEDY, num_tokens=90)
    whole = rows(decoder, prompts, how)

    def over(row: int, token: int) -> bool:
        counts[row] += 1
        return counts[row] > (2, 90, 30)[row]

    for use_cache in (True, False):
        counts = [0, 0, 0]
        assert rows(decoder, prompts, how, is_over=over, use_cache=use_cache) == [whole[0][:2], whole[1], whole[2][:30]]


def sample_on(recipe: Recipe, out: Path) -> None:
    with dist.setup() as world:
        run, state = loop.build(recipe, world)
        text = run.sample(state.params, 1)
        again = run.sample(state.params, 1)
        assert text is not None and text == again
        if world.is_main:
            out.write_text(text)


def test_the_same_text_on_one_rank_and_on_two(tmp_path: Path) -> None:
    """More tokens than the context of 32, so that the cache is filled twice."""
    base = tiny.recipe(tmp_path, sample=SampleConfig(every=1, prompt="<7>", num_tokens=50, temperature=1.0))
    tokenizer = str(write_tokenizer(tmp_path / "tokenizer.json"))
    recipe = replace(base, data=replace(base.data, tokenizer=tokenizer))
    sample_on(recipe, tmp_path / "one.txt")
    tiny.run_ranks(2, sample_on, recipe, tmp_path / "two.txt")
    assert (tmp_path / "one.txt").read_text() == (tmp_path / "two.txt").read_text() != ""


# -------------------------------------------------------------------------------------------------------------- draws


def processed(logits_BV: torch.Tensor, rows: list[list[int]], config: GenerateConfig) -> torch.Tensor:
    """Probabilities [B, V] by transformers' own classes, in the order in which its `generate` calls them."""
    from transformers.generation import logits_process as theirs

    chain: list[Any] = [theirs.RepetitionPenaltyLogitsProcessor(config.repetition_penalty)]
    chain += [theirs.TemperatureLogitsWarper(config.temperature)]
    chain += [theirs.TopKLogitsWarper(config.top_k)] if config.top_k else []
    chain += [theirs.TopPLogitsWarper(config.top_p)] if config.top_p < 1 else []
    chain += [theirs.MinPLogitsWarper(config.min_p)] if config.min_p else []
    for process in chain:
        logits_BV = process(torch.tensor(rows), logits_BV)
    return logits_BV.softmax(-1)


@pytest.mark.parametrize(
    "settings",
    (
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 10},
        {"top_k": 1000},
        {"top_p": 1e-9},
        {"top_p": 0.01},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.5},
        {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.3},
    ),
    ids=str,
)
def test_draws_have_the_probabilities_of_transformers(settings: dict[str, Any]) -> None:
    config = GenerateConfig(**{"temperature": 1.0, **settings})
    logits_BV = 4 * torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    seen = some_prompts(*[20] * 50)
    ours = generate.warp(generate.penalise(logits_BV, seen, config.repetition_penalty), config).softmax(-1)
    theirs = processed(logits_BV, seen, config)
    assert torch.equal(ours == 0, theirs == 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.2, 0.0])
    generator = torch.Generator().manual_seed(0)
    logits_BV = probabilities.log().expand(4000, -1)
    drawn = generate.draw(logits_BV, GenerateConfig(temperature=1.0), [generator] * 4000)
    counts = torch.tensor(drawn).bincount(minlength=4) / 4000
    torch.testing.assert_close(counts, probabilities, atol=0.025, rtol=0)  # three standard deviations
    assert counts[3] == 0


@pytest.mark.parametrize(
    "settings",
    (
        {"num_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
    ),
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    ((field, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"{field} is {value}, but must be"):
        GenerateConfig(**settings)


# --------------------------------------------------------------------------------------------------------------- text


def pieces(text: Continuation, tokens: list[int]) -> list[str]:
    """What a console shows, token by token, to the end."""
    shown = []
    for token in tokens:
        over = text.push(token)
        shown.append(text.take())
        if over:
            break
    text.finish()
    return [*shown, text.take()]


def test_half_a_character_is_never_shown() -> None:
    tokenizer, wanted = bytes_tokenizer(), "naïve 語 🙂 e\u0301 ok 👩‍👩‍👧"
    tokens = tokenizer.encode(wanted).ids
    assert len(tokens) == len(wanted.encode())  # a token a byte
    shown = pieces(Continuation(tokenizer, [1, 2, 3]), tokens)
    assert "".join(shown) == wanted
    assert not any("\ufffd" in piece for piece in shown)
    assert [piece for piece in shown if piece] == list(wanted)  # and a whole one at once


def test_bytes_that_are_no_text_are_shown_in_the_end() -> None:
    tokenizer = bytes_tokenizer()
    half = tokenizer.encode("ok 語").ids[:-1]
    text = Continuation(tokenizer, [])
    assert pieces(text, half)[-1] == "\ufffd" and text.text == "ok \ufffd"
    text = Continuation(tokenizer, [])
    assert "".join(pieces(text, [*half, *tokenizer.encode("!").ids])) == text.text == "ok \ufffd!"


def test_a_space_at_the_seam_of_prompt_and_text_stays() -> None:
    """A Llama tokenizer leaves out the space of the first word that it decodes, which is not the first here."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "▁one": 1, "▁two": 2, "▁three": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert tokenizer.decode([2, 3]) == "two three"
    assert pieces(Continuation(tokenizer, [1]), [2, 3]) == [" two", " three", ""]


def stopped(stops: tuple[str, ...], wanted: str) -> tuple[Continuation, list[str]]:
    tokenizer = bytes_tokenizer()
    text = Continuation(tokenizer, tokenizer.encode("prompt END").ids, stops=stops)
    return text, pieces(text, tokenizer.encode(wanted).ids)


def test_a_stop_string_across_tokens_ends_the_text_and_is_no_part_of_it() -> None:
    text, shown = stopped(("END", "語語"), "go on EN or END and more")
    assert text.text == "".join(shown) == "go on EN or " and text.stop_reason == "string"
    assert len(text.tokens) == len("go on EN or END")
    assert shown[7:9] == ["", "EN "]  # held back for as long as it could have been one
    text, shown = stopped(("END", "語語"), "a 語 b 語語 c")
    assert text.text == "".join(shown) == "a 語 b "


def test_the_first_of_several_stop_strings_counts() -> None:
    assert stopped(("c", "bcd", "abcde"), "xabcdef")[0].text == "xab"


def test_the_beginning_of_a_stop_string_is_text_in_the_end() -> None:
    text, shown = stopped(("END",), "the EN")
    assert text.text == "".join(shown) == "the EN" and text.stop_reason == "length"


def test_a_stop_string_within_a_token_cuts_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(write_tokenizer(tmp_path / "tokenizer.json")))
    text = Continuation(tokenizer, [1], stops=("2>",))
    assert "".join(pieces(text, [7, 42, 8])) == text.text == "<7><4" and text.tokens == [7, 42]


def test_the_end_of_the_document_is_no_part_of_the_text() -> None:
    tokenizer = bytes_tokenizer()
    text = Continuation(tokenizer, [1], ends=frozenset({5}))
    assert pieces(text, [*tokenizer.encode("ab").ids, 5, 6]) == ["a", "b", "", ""]
    assert text.stop_reason == "eod" and text.tokens == tokenizer.encode("ab").ids


# ------------------------------------------------------------------------------------------------------- command line


def command(run: Path, *args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "modalities.generate", str(run), *args],
        capture_output=True,
        text=True,
        env=environment,
        input=stdin,
        timeout=120,
    )


GREEDY_FLAGS = ("--temperature", "0", "--num-tokens", "6")


def by_rule(first: int, n: int) -> str:
    tokens = [first]
    for _ in range(n):
        tokens.append((7 * tokens[-1] + 3) % 100)
    return "".join(f"<{token}>" for token in tokens)


def test_a_prompt_is_continued_on_the_console(trained: Path) -> None:
    done = command(trained, "--prompt", "<5>", *GREEDY_FLAGS)
    assert (done.stdout, done.returncode) == (by_rule(5, 6) + "\n", 0), done.stderr


def shown(capsys: pytest.CaptureFixture[str], run: Path, *args: str) -> str:
    """What the command prints, in this process."""
    generate.run([str(run), *args])
    return capsys.readouterr().out


def test_several_prompts_as_json_end_for_their_reasons(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # 5 38 69 86 5 …; 13 94 61 30 13 …; 72 7 52 67 72 …; 28 99
    prompts = ("--prompt", "<5>", "--prompt", "<28>", "--prompt", "<72>")
    lines = shown(capsys, trained, "--json", *prompts, "--stop", "67", *GREEDY_FLAGS).splitlines()
    found = [json.loads(line) for line in lines]
    assert [line["prompt"] for line in found] == ["<5>", "<28>", "<72>"]
    assert [line["stop_reason"] for line in found] == ["length", "eod", "string"]
    assert [line["text"] for line in found] == [by_rule(5, 6).removeprefix("<5>"), "", "<7><52><"]
    assert [line["tokens"] for line in found] == [[38, 69, 86, 5, 38, 69], [], [7, 52, 67]]
    assert {line["checkpoint"] for line in found} == {str(trained / "step-00000150")}


def test_prompts_from_a_file_and_from_a_pipe_are_the_same(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("<5>\n<6><7>\n<8>\n")
    flags = ("--json", "--temperature", "1.5", "--num-tokens", "8")
    file = shown(capsys, trained, *flags, "--prompts", str(tmp_path / "prompts.txt"), "--batch-size", "2")
    # Python's, not ours: what a pipe would hold. A pipe itself is in the tests of the command line.
    monkeypatch.setattr("sys.stdin", io.StringIO("<5>\n<6><7>\n<8>"))
    assert shown(capsys, trained, *flags, "--no-cache") == file and len(file.splitlines()) == 3


def test_several_prompts_are_told_apart(trained: Path) -> None:
    done = command(trained, *GREEDY_FLAGS, stdin="<5>\n<6>\n")
    assert done.stdout == f"--- prompt 1\n{by_rule(5, 6)}\n--- prompt 2\n{by_rule(6, 6)}\n", done.stderr


def test_on_a_terminal_it_asks_for_prompts(trained: Path) -> None:
    ours, its = pty.openpty()
    arguments = [sys.executable, "-m", "modalities.generate", str(trained), *GREEDY_FLAGS]
    with subprocess.Popen(arguments, stdin=its, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        os.write(ours, b"<5>\n<6>\n\n")
        stdout, stderr = process.communicate(timeout=120)
    os.close(ours)
    os.close(its)
    assert process.returncode == 0 and "an empty one ends" in stderr
    assert [line.removeprefix("> ") for line in stdout.splitlines()][:2] == [by_rule(5, 6), by_rule(6, 6)]


def test_a_mistake_ends_in_one_line(trained: Path) -> None:
    done = command(trained, "--top-p", "2", stdin="<5>")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "error: top_p is 2.0, but must be over 0 and at most 1\n"


MISTAKES = {
    "no prompt": ([], "there is no prompt in the standard input; give one a line, or --prompt TEXT"),
    "two ways": (["--prompt", "x", "--prompts", "x"], "--prompt and --prompts are both given"),
    "unknown flag": (["--prompt", "x", "--topk", "2"], "Unrecognized options: --topk; did you mean --top-k?"),
    "empty stop": (["--prompt", "x", "--stop", ""], "--stop is empty"),
    "batch": (["--prompt", "x", "--batch-size", "0"], "--batch-size is 0"),
    "context": (
        ["--prompt", "x", "--context", "65"],
        "--context is 65, but must be from 1 to the model's max_seq_len 64",
    ),
}


@pytest.mark.parametrize("args, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_refused(args: list[str], message: str, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An empty pipe, for the test's own standard input may be a terminal.
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(ValueError, match=re.escape(message)):
        generate.run([str(trained), *args])


def test_a_model_without_a_tokenizer_knows_no_text(tmp_path: Path) -> None:
    run = loop.train(tiny.recipe(tmp_path, steps=1))
    with pytest.raises(ValueError, match="has no tokenizer"):
        generate.main(run, prompt=("x",))
