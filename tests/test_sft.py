"""Instruction tuning end to end: the demo's conversations, a mask that nothing gets through, a model that answers."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from modalities import commands, demo_chat, generate, loop, recipe, step, trained
from modalities.checkpoint import CheckpointConfig
from modalities.data import TrainData
from modalities.dist import World
from modalities.generate import Continuation, GenerateConfig
from modalities.kl import DistillConfig, distillation
from modalities.loss import IGNORED, Batch, LossConfig, linear_cross_entropy
from modalities.model import ModelConfig, build_skeleton, initial_weight
from modalities.pbin import open_pbin
from modalities.recipe import Recipe

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = ModelConfig(vocab_size=384, num_layers=2, width=64, num_heads=4, max_seq_len=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `demo_chat`, as `prep.py demo-chat` makes it."""
    folder = tmp_path_factory.mktemp("sft")
    commands.demo_chat(folder / "demo_chat")
    return folder


def sft(folder: Path, **changes: object) -> Recipe:
    """The recipe `sft_demo` on the files in `folder`."""
    found, _ = recipe.load(str(ROOT / "recipes" / "sft_demo.py"))

    def here(paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(path.replace("data/", f"{folder}/") for path in paths)

    data = found.data
    (tokenizer,) = here((data.tokenizer,))
    files = {name: here(getattr(data, name)) for name in ("train", "masks", "val", "val_masks")}
    log = replace(found.log, dir=str(folder / "runs"), tensorboard=False)
    return replace(found, data=replace(data, tokenizer=tokenizer, **files), log=log, **changes)  # type: ignore[arg-type]


def test_questions_are_many_and_those_held_out_are_new() -> None:
    found = dict(demo_chat.conversations())
    assert len(found) == len([*demo_chat.conversations()]) == 600, "a question is there twice"
    held_out = {question for question in found if demo_chat.is_held_out(question)}
    assert len(held_out) == 51
    # Each kind is among them, and none asks for a thing or a word that training has not.
    assert {question.split()[0] for question in held_out} >= {"What", "Add", "How", "Repeat"}
    words = {word.strip(".?") for question in found.keys() - held_out for word in question.split()}
    assert {word.strip(".?") for question in held_out for word in question.split()} <= words


def test_the_file_is_the_template_and_the_mask_is_the_answers(folder: Path) -> None:
    made, config = folder / "demo_chat", sft(folder).data
    tokenizer = trained.load_tokenizer(made / "tokenizer.json", 384)
    asked = {True: set[str](), False: set[str]()}
    for held_out, name in ((False, "train"), (True, "val")):
        rows = [json.loads(line)["messages"] for line in (made / f"{name}.jsonl").read_text().splitlines()]
        packed, mask = (open_pbin(made / f"{name}{ending}.pbin") for ending in ("", ".mask"))
        for i, (user, assistant) in enumerate(rows):
            tokens, learnt = packed.document(i), mask.document(i).astype(bool)
            prompt, answer = demo_chat.prompt(user["content"]), assistant["content"] + demo_chat.END
            assert tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == prompt + answer
            assert tokenizer.decode(tokens[learnt].tolist(), skip_special_tokens=False) == answer
            asked[held_out].add(user["content"])
        assert packed.num_documents == len(rows)
    assert not asked[True] & asked[False] and len(asked[True] | asked[False]) == 600
    assert config.eod == demo_chat.END


def first_batch(folder: Path) -> Batch:
    data = replace(sft(folder).data, global_batch=4)
    return {key: value[0] for key, value in TrainData(data, 384, 0, 4, World(0, 1, CPU, None)).read(0).items()}


HEADS = {
    "plain": LossConfig(implementation="plain"),
    "chunked": LossConfig(implementation="chunked", chunk_tokens=50),
    "with all terms": LossConfig(implementation="chunked", chunk_tokens=50, z_loss=1e-3, label_smoothing=0.1),
}


@pytest.mark.parametrize("name", [*HEADS, "distilled"])
def test_a_masked_token_has_exactly_no_gradient(folder: Path, name: str) -> None:
    """Position by position, of the last hidden states; whatever the model computes there, all else keeps its bits."""
    batch, generator = first_batch(folder), torch.Generator().manual_seed(0)
    masked = batch["targets"] == IGNORED
    assert 0.3 < masked.float().mean() < 0.8
    hidden = torch.randn(*masked.shape, 32, generator=generator)
    weight = torch.randn(384, 32, generator=generator)

    def loss_fn(hidden: Tensor, weight: Tensor) -> Tensor:
        if name != "distilled":
            return linear_cross_entropy(hidden, weight, batch["targets"], HEADS[name], 384)[0]
        teacher = {"teacher_hidden": hidden.detach() * 2, "teacher_weight": weight.detach()}
        options = (HEADS["chunked"], 384, 0.0, 1.0, False, teacher)
        return distillation(DistillConfig(), 0.0, hidden, weight, batch["targets"], *options)[0]

    def gradients(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaves = hidden.requires_grad_(), weight.clone().requires_grad_()
        loss = loss_fn(*leaves)
        hidden_grad, weight_grad = torch.autograd.grad(loss, leaves)
        return hidden_grad, weight_grad, loss.detach()

    clean = gradients(hidden.clone())
    assert (clean[0][masked] == 0).all(), "a masked token has a gradient"
    assert clean[0][~masked].abs().amax(-1).min() > 0, "a token that is learnt has none"
    changed = gradients(torch.where(masked[..., None], torch.randn(hidden.shape, generator=generator), hidden))
    assert torch.equal(clean[0], changed[0]) and torch.equal(clean[2], changed[2])
    torch.testing.assert_close(clean[1], changed[1], rtol=1e-5, atol=1e-6)


def test_other_targets_under_the_mask_leave_every_bit_of_the_models_gradient(folder: Path) -> None:
    batch, model = first_batch(folder), build_skeleton(TINY)
    generator = torch.Generator().manual_seed(0)
    params = {n: initial_weight(TINY, n, p.shape, generator) for n, p in model.named_parameters()}
    grad_fn = step.grad_and_value(step.make_loss_fn(model, torch.float32, train=True), sharded=False, compile=False)
    masked, count = batch["targets"] == IGNORED, {"num_targets": torch.tensor(50.0)}
    seen = torch.where(masked, torch.randint(384, masked.shape, generator=generator), batch["targets"])
    other = torch.where(masked, torch.randint(384, masked.shape, generator=generator), batch["targets"])
    expected, _ = grad_fn(params, {**batch, **count})
    for targets in (seen, other):
        found, _ = grad_fn(params, {**batch, **count, "targets": torch.where(masked, IGNORED, targets)})
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        unmasked, _ = grad_fn(params, {**batch, **count, "targets": targets})
        assert not torch.equal(unmasked["embed.weight"], expected["embed.weight"])


def answers(run: Path, questions: list[str]) -> list[Continuation]:
    """What the model says after the template's prompt, greedily, all questions at once."""
    model = trained.load(run, CPU)
    assert model.tokenizer is not None
    tokenizer = trained.load_tokenizer(model.tokenizer, 384)
    ends, decoder = (
        trained.end_tokens(model, tokenizer),
        generate.make_decoder(model.model, model.params, model.dtype, CPU),
    )
    texts = [Continuation(tokenizer, tokenizer.encode(demo_chat.prompt(q)).ids, ends) for q in questions]
    for _ in generate.continue_texts(decoder, texts, GenerateConfig(num_tokens=24, temperature=0.0), 64):
        pass
    return texts


def test_a_model_learns_to_answer_in_the_template(folder: Path) -> None:
    """So little training is for the colours alone."""
    colours = folder / "colours.jsonl"
    lines = (folder / "demo_chat" / "train.jsonl").read_text().splitlines(keepends=True)
    colours.write_text("".join(line for line in lines if "colour" in line))
    made = folder / "demo_chat"
    commands.chat((str(colours),), made / "tokenizer.json", eod=demo_chat.END)
    base = sft(folder, name="quick", steps=120, model=TINY, checkpoint=CheckpointConfig(every=0))
    data = replace(base.data, train=(str(folder / "colours.pbin"),), masks=(str(folder / "colours.mask.pbin"),))
    run = loop.train(
        replace(
            base,
            data=replace(data, global_batch=4),
            optim=replace(base.optim, lr=1e-2),
            parallel=replace(base.parallel, micro_batch=4, compile="off", param_dtype="float32"),
            eval=replace(base.eval, every=0, samples=4),
            sample=replace(base.sample, every=0),
        )
    )
    right = {q: a for q, a in demo_chat.conversations() if "colour" in q and not demo_chat.is_held_out(q)}
    found = answers(run, [*right])
    assert all(text.stop_reason == "eod" for text in found), "an answer does not end with the template's end"
    assert sum(text.text == a for text, a in zip(found, right.values(), strict=True)) >= 0.8 * len(right)


@tiny.needs_compiler
@pytest.mark.slow
def test_the_recipe_as_a_user_runs_it(tmp_path: Path) -> None:
    """Three commands in an empty folder; of the questions that were held out at least nine in ten are answered."""
    command = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=1200)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command([sys.executable, ROOT / "prep.py", "demo-chat"])
    command([sys.executable, ROOT / "train.py", "--recipe", "sft_demo"])
    held_out = [(q, a) for q, a in demo_chat.conversations() if demo_chat.is_held_out(q)]
    prompts = [word for question, _ in held_out for word in ("--prompt", demo_chat.prompt(question))]
    generating = [sys.executable, "-m", "modalities.generate", "runs/sft_demo", "--temperature", "0", "--json"]
    lines = command([*generating, "--num-tokens", "24", *prompts], env=environment).stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert all(answer["stop_reason"] == "eod" for answer in found)
    assert sum(answer["text"] == right for answer, (_, right) in zip(found, held_out, strict=True)) >= 46
