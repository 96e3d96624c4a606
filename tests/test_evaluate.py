"""Evaluation: the loop's own loss, each target once, bytes as they are in the text, the same on one rank and on two."""

import contextlib
import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from words import write_words

from modalities import dist, evaluate, loop, trained
from modalities.checkpoint import CheckpointConfig
from modalities.data import DataConfig, open_val
from modalities.evaluate import Score, bytes_per_token, data_config
from modalities.log import read_metrics
from modalities.pbin import open_pbin, write_pbin
from modalities.tokenizer import EOD, train_tokenizer

CPU = torch.device("cpu")
ONE = dist.World(0, 1, CPU, None)
TEXTS = [f"{i}. Größe ≥ {i * i} €; naïve 漢字 🙂\n" * (1 + i % 3) for i in range(40)]


def pack(path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    with write_pbin(path, tokenizer.get_vocab_size()) as append:
        for text in texts:
            append(np.array([*tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.token_to_id(EOD)]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on texts, with their tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    train_tokenizer(TEXTS, 300, folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for name, texts in (("train", TEXTS[:30]), ("val", TEXTS[30:])):
        pack(folder / f"{name}.pbin", tokenizer, texts)
    base = tiny.recipe(folder, model=replace(tiny.MODEL, vocab_size=300))
    return loop.train(replace(base, data=replace(base.data, tokenizer=str(folder / "tokenizer.json"))))


def scores_of(model: trained.Trained, config: DataConfig, batch: int, samples: int = 0) -> dict[str, Score]:
    files = open_val(config, model.model.config.vocab_size, samples, batch, ONE)
    return evaluate.evaluate(model, files, None, CPU)


def evaluated(capsys: pytest.CaptureFixture[str], model: Path, **options: Any) -> dict[str, Any]:
    evaluate.main(model, json=True, **options)
    return json.loads(capsys.readouterr().out)


WAYS: list[dict[str, Any]] = [
    {},
    {"sampling": "best_fit", "document_mask": True},
    {"sampling": "documents"},
    {"reuse_last_target": False, "document_mask": True},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way) or "continuous")
def test_the_loss_is_that_of_the_loop(
    run: Path, tmp_path: Path, way: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Read by the loop at its last step, in batches of another size."""
    train, val = ((str(run.parents[1] / f"{name}.pbin"),) for name in ("train", "val"))
    base = tiny.recipe(tmp_path, model=replace(tiny.MODEL, vocab_size=300), checkpoint=CheckpointConfig(every=0))
    recipe = replace(base, steps=5, data=replace(base.data, train=train, val=val, **way))
    loop.train(recipe)
    capsys.readouterr()
    expected = [line["val/val/loss"] for line in read_metrics(recipe.folder) if "val/val/loss" in line][-1]
    found = evaluated(capsys, recipe.folder, data=val, samples=recipe.eval.samples, batch_size=3)
    assert found["total"]["loss"] == pytest.approx(expected, rel=0, abs=1e-6)
    assert found == evaluated(capsys, recipe.folder, samples=recipe.eval.samples, batch_size=3)  # the recipe's own sets


def test_each_target_counts_once_in_batches_of_any_size(run: Path) -> None:
    model = trained.load(run, CPU)
    config = data_config(model, (), (), 24)
    by_batch = [scores_of(model, config, batch)["val"] for batch in (1, 7, 1000)]
    num_sequences = (len(open_pbin(Path(config.val[0])).tokens) - 1) // 24
    assert {(score.sequences, score.tokens) for score in by_batch} == {(num_sequences, 24 * num_sequences)}
    assert by_batch[0].nats == pytest.approx(by_batch[1].nats, rel=1e-6) == pytest.approx(by_batch[2].nats, rel=1e-6)


def test_bytes_are_those_of_the_text(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of one sequence, whose first token is no target, each other one is."""
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    eod = tokenizer.token_to_id(EOD)
    text = "Straße 漢 🙂"
    with write_pbin(tmp_path / "one.pbin", 300) as append:
        append(np.array([eod, *tokenizer.encode(text).ids, eod]))
    num_targets = len(tokenizer.encode(text).ids) + 1
    found = evaluated(capsys, run, data=(str(tmp_path / "one.pbin"),), seq_len=num_targets)["sources"]["one"]
    assert found["tokens"] == num_targets and found["bytes"] == len(text.encode()) == 16
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * num_targets / math.log(2) / 16)


def sizes(tokenizer: Tokenizer, text: str) -> list[int]:
    table = bytes_per_token(tokenizer, tokenizer.get_vocab_size() + 3, None)
    return table[tokenizer.encode(text, add_special_tokens=False).ids].tolist()


def test_bytes_of_any_tokenizer(tmp_path: Path) -> None:
    """SentencePiece's spaces and bytes, words that are joined by a space, tokens that were added to a vocabulary."""
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "é": 3, "▁a": 4} | {f"<0x{i:02X}>": 5 + i for i in range(256)}
    piece = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True))
    piece.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    strip = decoders.Strip(content=" ", left=1, right=0)
    replaced = decoders.Replace("▁", " ")
    piece.decoder = decoders.Sequence([replaced, decoders.ByteFallback(), decoders.Fuse(), strip])
    found = sizes(piece, "a é a漢")
    assert found == [2, 1, 2, 2, 1, 1, 1] and sum(found) == len(" a é a漢".encode())

    words = Tokenizer.from_file(str(write_words(tmp_path / "words.json", {"a": 0, "b": 1, "<eod>": 2})))
    assert sizes(words, "a b <eod> a") == [2, 2, 0, 2]  # as decode joins them

    level = Tokenizer.from_file(str(byte_level(tmp_path)))
    level.add_tokens(["né"])
    level.add_special_tokens(["<|chat|>"])
    found = sizes(level, "né<|chat|> 漢")
    assert found == [3, 0, 1, 1, 1, 1]
    assert bytes_per_token(level, 400, "né")[level.token_to_id("né")] == 0


def byte_level(folder: Path) -> Path:
    train_tokenizer(["a"], 257, folder / "bytes.json")
    return folder / "bytes.json"


def test_several_files_and_their_total(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tuple(str(run.parents[1] / f"{name}.pbin") for name in ("train", "val"))
    found = evaluated(capsys, run, data=files)
    parts, total = found["sources"], found["total"]
    assert list(parts) == ["train", "val"] and found["seq_len"] == 32
    for key in ("sequences", "tokens", "bytes"):
        assert total[key] == parts["train"][key] + parts["val"][key]
    nats = sum(part["loss"] * part["tokens"] for part in parts.values())
    assert total["loss"] == pytest.approx(nats / total["tokens"])
    assert total["bits_per_byte"] == pytest.approx(nats / math.log(2) / total["bytes"])
    evaluate.main(run, data=files)
    head, *rows = capsys.readouterr().out.splitlines()[1:]
    assert head.split() == ["source", "sequences", "tokens", "bytes", "loss", "perplexity", "bits/byte"]
    assert [row.split()[0] for row in rows] == ["train", "val", "total"] and len({len(row) for row in rows}) == 1
    assert rows[2].split()[4] == f"{total['loss']:.4f}"


def test_a_mask_chooses_the_targets(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.parents[1] / "val.pbin"
    num_tokens = len(open_pbin(path).tokens)
    for name, ones in (("some", num_tokens // 3), ("none", 0)):
        with write_pbin(tmp_path / f"{name}.pbin", 2) as append:
            append((np.arange(num_tokens) < ones).astype(np.uint8))
    found = evaluated(capsys, run, data=(str(path),), masks=(str(tmp_path / "some.pbin"),))
    assert found["total"]["tokens"] == num_tokens // 3 - 1  # the first is no target
    with pytest.raises(ValueError, match=r"none of the tokens read from .*val\.pbin is a target; give more --samples"):
        evaluate.main(run, data=(str(path),), masks=(str(tmp_path / "none.pbin"),))


def evaluate_on_ranks(run: Path, out: Path) -> None:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        evaluate.main(run, json=True, batch_size=2)
    if shown.getvalue():
        out.write_text(shown.getvalue())


def test_the_same_on_one_rank_and_on_two(run: Path, tmp_path: Path) -> None:
    evaluate_on_ranks(run, tmp_path / "one.json")
    tiny.run_ranks(2, evaluate_on_ranks, run, tmp_path / "two.json")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())["total"] for name in ("one", "two"))
    assert (one["tokens"], one["bytes"]) == (two["tokens"], two["bytes"])
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-6)


def test_a_model_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny.recipe(tmp_path, steps=1)
    loop.train(recipe)
    capsys.readouterr()
    evaluate.main(recipe.folder)
    shown = capsys.readouterr().out
    assert "no bits per byte: the model has no tokenizer.json" in shown and shown.splitlines()[2].split()[-1] == "–"
    assert evaluated(capsys, recipe.folder)["total"]["bits_per_byte"] is None


def test_what_cannot_be_evaluated_is_refused(run: Path, tmp_path: Path) -> None:
    mistakes: dict[str, dict[str, Any]] = {
        r"--seq-len is 65, but must be between 1 and the model's context of 64": {"seq_len": 65},
        r"--seq-len is 0, but must": {"seq_len": 0},
        r"--batch-size is 0, but must be at least 1": {"batch_size": 0},
        r"--samples is -1, but must be at least 0": {"samples": -1},
        r"--masks needs --data": {"masks": ("mask.pbin",)},
        r"nowhere\.pbin": {"data": ("nowhere.pbin",)},
        r"data\.val has two files called 'a'": {"data": ("a.pbin", "b/a.pbin")},
    }
    for message, options in mistakes.items():
        with pytest.raises((ValueError, OSError), match=message):
            evaluate.main(run, **options)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        evaluate.main(tmp_path)


def test_a_loss_that_is_not_finite_is_null_in_json() -> None:
    for nats in (math.inf, math.nan):
        score = Score(sequences=1, tokens=2, num_bytes=3, nats=nats)
        assert evaluate.as_json(score)["loss"] is evaluate.as_json(score)["perplexity"] is None
    assert Score(sequences=1, tokens=1, num_bytes=None, nats=1e4).perplexity == math.inf


def test_a_hugging_face_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss is the one that transformers gives."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=40, initializer_range=0.3, **sizes))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((run / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOD}))
    capsys.readouterr()
    path = run.parents[1] / "val.pbin"
    found = evaluated(capsys, tmp_path, data=(str(path),), batch_size=5)
    tokens = torch.from_numpy(open_pbin(path).tokens.astype(np.int64))
    rows = torch.stack([tokens[i : i + 41] for i in range(0, len(tokens) - 40, 40)])
    with torch.no_grad():
        logits = theirs(rows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert found["total"]["loss"] == pytest.approx(float(expected), abs=1e-5)
    assert found["seq_len"] == 40 and found["total"]["tokens"] == rows[:, 1:].numel() and found["total"]["bytes"] > 0
    with pytest.raises(ValueError, match="there is nothing to evaluate on; give --data"):
        evaluate.main(tmp_path)


def test_the_command_line(run: Path) -> None:
    command = [sys.executable, "-m", "modalities.evaluate", str(run), "--data", str(run.parents[1] / "val.pbin")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "step-00000020: sequences of 32 tokens, continuous, torch.float32" in shown and "\nval " in shown
