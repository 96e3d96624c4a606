"""An exported model in lm-evaluation-harness, on a task of its own without a network."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer

from modalities import evaluate, hf, loop
from modalities.pbin import write_pbin
from modalities.tokenizer import EOD, train_tokenizer

TASK = """
task: local_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {documents}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
NUMBERS = ["zero", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]


def counting(seed: int) -> list[str]:
    """Words that are easy to predict, without end."""
    start = int(np.random.default_rng(seed).integers(10))
    return [NUMBERS[(start + i) % 10] for i in range(1000)]


def cut(words: list[str], tokenizer: Tokenizer, multiple: int, least: int) -> tuple[str, list[int]]:
    """The shortest text of these words with so many tokens that sequences of `multiple` hold them without a rest."""
    for end in range(1, len(words)):
        text = " ".join(words[:end])
        tokens = tokenizer.encode(text).ids
        if len(tokens) >= least and len(tokens) % multiple == 0:
            return text, tokens
    raise AssertionError("no such text")


# `make test-all` installs it; `make test` does without its 390 MB.
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_harness_finds_our_bits_per_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rolling windows are our sequences where a text begins after an end of document and fills them."""
    train_tokenizer([" ".join(NUMBERS)], 280, tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    eod, context = tokenizer.token_to_id(EOD), tiny.MODEL.max_seq_len
    texts, files = [], tuple(str(tmp_path / f"text{i}.pbin") for i in range(3))
    for i, file in enumerate(files):
        text, tokens = cut(counting(i), tokenizer, context, (i + 1) * context)
        texts.append(text)
        with write_pbin(Path(file), 280) as append:
            append(np.array([eod, *tokens]))
    base = tiny.recipe(tmp_path, model=replace(tiny.MODEL, vocab_size=280), steps=40)
    run = loop.train(
        replace(base, data=replace(base.data, train=files, val=files, tokenizer=str(tmp_path / "tokenizer.json")))
    )
    hf.export(run, tmp_path / "exported")
    capsys.readouterr()
    evaluate.main(run, data=files, seq_len=context, json=True)
    ours = json.loads(capsys.readouterr().out)["total"]
    assert ours["bytes"] == sum(len(text.encode()) for text in texts) and ours["bits_per_byte"] < 3

    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "local_text.yaml").write_text(TASK.format(documents=tmp_path / "documents.jsonl"))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "local_text", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'exported'},dtype=float32", "--batch_size", "2"]
    command += ["--include_path", str(tmp_path / "task"), "--output_path", str(tmp_path / "results")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=os.environ | offline, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "results").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]["local_text"]
    assert theirs["bits_per_byte,none"] == pytest.approx(ours["bits_per_byte"], rel=1e-5)
    assert theirs["byte_perplexity,none"] == pytest.approx(2 ** ours["bits_per_byte"], rel=1e-5)
