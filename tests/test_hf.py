"""Hugging Face folders both ways: what is trained here works in transformers, what comes from there trains here."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_families import MODELS, assert_close, some_tokens, write_theirs
from tokenizers import Tokenizer
from torch import Tensor
from words import write_words

from modalities import checkpoint, hf, loop, trained
from modalities.checkpoint import CheckpointConfig
from modalities.config import to_dict
from modalities.data import open_val
from modalities.dist import World
from modalities.families import layout, read_config, read_weights
from modalities.model import ModelConfig, build_skeleton, initial_weight
from modalities.recipe import Recipe, from_json
from modalities.step import EvalConfig, TrainState, apply

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
VOCAB = {"<eod>": 0} | {chr(0x100 + i): i for i in range(1, 100)}


def recipe(folder: Path, **changes: Any) -> Recipe:
    base = tiny.recipe(folder, checkpoint=CheckpointConfig(every=0), **changes)
    tokenizer = write_words(folder / "tokenizer.json", VOCAB)
    return replace(base, data=replace(base.data, tokenizer=str(tokenizer), eod="<eod>"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return loop.train(recipe(folder, steps=150, eval=EvalConfig(every=0)))


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    hf.export(run, out)
    return out


def load_theirs(folder: Path) -> Any:
    """The model as transformers loads it, which it says it did completely."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def our_logits(path: Path, tokens: Tensor) -> Tensor:
    loaded = trained.load(path, CPU)
    return apply(loaded.model, loaded.params, tokens, train=False)


def write_checkpoint(run: Path, config: ModelConfig = tiny.MODEL, nan: bool = False) -> Path:
    """A checkpoint of random weights without optimizer state, in a run without a tokenizer."""
    generator = torch.Generator().manual_seed(0)
    named = build_skeleton(config).named_parameters()
    params = {name: initial_weight(config, name, p.shape, generator) for name, p in named}
    if nan:
        params["blocks.0.mlp.w_up.weight"][3, 5] = torch.nan
    facts = to_dict(tiny.recipe(run.parent, model=config))
    return checkpoint.save(run, TrainState(params, {}), facts, is_main=True)


# --------------------------------------------------------------------------------------------------------------- export


def test_transformers_computes_what_we_do(run: Path, exported: Path) -> None:
    theirs, tokens = load_theirs(exported), some_tokens()
    with torch.no_grad():
        their_logits = theirs(tokens).logits
    assert_close(our_logits(run, tokens), their_logits)
    assert torch.equal(our_logits(exported, tokens), our_logits(run, tokens))


def test_greedy_text_is_the_same(run: Path, exported: Path) -> None:
    text = "\u0105 \u0117 \u0122"
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    ids = Tokenizer.from_file(str(run / "tokenizer.json")).encode(text).ids
    assert tokenizer(text).input_ids == ids == [5, 23, 34]
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token) == ("<eod>", 0, "<eod>")
    assert tokenizer.model_max_length == tiny.MODEL.max_seq_len

    loaded, ours = trained.load(run, CPU), list(ids)
    while len(ours) < 60:
        ours.append(int(apply(loaded.model, loaded.params, torch.tensor([ours]), train=False)[0, -1].argmax()))
    assert len(set(ours)) > 4
    theirs = load_theirs(exported).generate(torch.tensor([ids]), max_length=60, do_sample=False)[0].tolist()
    end = ours.index(0) + 1 if 0 in ours else 60
    assert theirs == ours[:end]


def test_perplexity_is_the_same(run: Path, exported: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ours = [line["val/val/loss"] for line in lines if "val/val/loss" in line][-1]
    theirs, config = load_theirs(exported), from_json(run / "recipe.json")
    world = World(rank=0, size=1, device=CPU, mesh=None)
    (batches,) = open_val(config.data, config.model.vocab_size, 0, 4, world).values()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            logits = theirs(batch["inputs"]).logits.flatten(0, 1)
            total += float(F.cross_entropy(logits, batch["targets"].flatten(), reduction="sum"))
            count += int((batch["targets"] != -100).sum())
    assert count > 3000
    assert math.exp(ours) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_the_folder_says_what_it_holds(run: Path, exported: Path) -> None:
    assert (exported / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    assert json.loads((exported / "generation_config.json").read_text()) == {
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    card = (exported / "README.md").read_text()
    assert "after 150 steps of training on 38,400 tokens" in card and '"name": "tiny"' in card
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for line in losses for key, value in line.items()}
    assert f"| val/val/loss | {last['val/val/loss']:.4f} |" in card and f"| loss | {last['loss']:.4f} |" in card
    assert read_config(exported) == replace(tiny.MODEL, head_dim=8)
    # Rows that pad our vocabulary are nowhere in it.
    assert load_file(exported / "model.safetensors")["model.embed_tokens.weight"].shape == (100, 32)


def train_on_two(recipe: Recipe) -> None:
    loop.train(recipe)


def test_a_checkpoint_of_two_ranks_in_files_of_few_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(tmp_path, steps=2)
    tiny.run_ranks(2, train_on_two, config)
    assert len(list((config.folder / "step-00000002").glob("*.distcp"))) == 2
    for name in ("out", "again"):
        hf.main(
            ["export", str(config.folder / "step-00000002"), "--out", str(tmp_path / name), "--max-shard-size", "9KB"]
        )
    shown = capsys.readouterr().out
    assert "all 20 parameters are there once, and equal to the checkpoint's to the bit; logits differ by" in shown
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert [file.name for file in files[:1]] == [f"model-00001-of-{len(files):05}.safetensors"] and len(files) > 5
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 9000
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    tokens = some_tokens()
    with torch.no_grad():
        assert_close(our_logits(config.folder, tokens), load_theirs(tmp_path / "out")(tokens).logits)


def test_bfloat16_halves_the_file(run: Path, exported: Path, tmp_path: Path) -> None:
    hf.export(run, tmp_path / "out", dtype="bfloat16")
    tensors, exact = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", exported))
    assert all(torch.equal(tensor, exact[name].bfloat16()) for name, tensor in tensors.items())
    assert load_theirs(tmp_path / "out").dtype == torch.bfloat16
    assert trained.load(tmp_path / "out", CPU).dtype == torch.bfloat16


def test_the_checkpoint_of_a_step(tmp_path: Path) -> None:
    config = replace(recipe(tmp_path, steps=4), checkpoint=CheckpointConfig(every=2))
    run = loop.train(config)
    hf.export(run, tmp_path / "out", step=2)
    tokens = some_tokens()
    assert torch.equal(our_logits(tmp_path / "out", tokens), our_logits(run / "step-00000002", tokens))
    assert "after 2 steps" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"has no checkpoint of step 3; it has 2, 4"):
        hf.export(run, tmp_path / "other", step=3)
    with pytest.raises(ValueError, match="leave --step out"):
        hf.export(run / "step-00000002", tmp_path / "other", step=2)
    with pytest.raises(ValueError, match="is a Hugging Face folder already"):
        hf.export(tmp_path / "out", tmp_path / "other")
    with pytest.raises(ValueError, match="out exists already; remove it or give another --out"):
        hf.export(run, tmp_path / "out")


EXPORT = """
import sys, torch
from pathlib import Path
from modalities import devices, hf

peaks = []
for run in sys.argv[1:]:
    hf.export(Path(run), Path(run + "-out"), max_shard_size="10MB")
    peaks.append(devices.peak_memory(torch.device("cpu")) // 2**20)
print(*peaks)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Its logits are compared, too, a layer at a time: the second is 125 MB larger than the first.

    glibc keeps freed memory, up to 150 MB more in one run than in another, unless each tensor is its own mapping.
    """
    runs = [tmp_path / f"layers{layers}" for layers in (2, 12)]
    for run, layers in zip(runs, (2, 12), strict=True):
        write_checkpoint(run, replace(tiny.MODEL, width=512, mlp_width=1536, num_layers=layers))
    command, environ = [sys.executable, "-c", EXPORT, *map(str, runs)], os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environ)
    assert done.stdout.count("; logits differ by at most") == 2
    small, large = map(int, done.stdout.splitlines()[-1].split())
    print(small, large)
    assert large - small < 30


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "run")
    with pytest.raises(ValueError, match="holds no checkpoint; give a run"):
        hf.export(tmp_path, tmp_path / "out")
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-8] + b"damaged!")
    with pytest.raises(ValueError, match=r"is damaged: .*\.distcp"):
        hf.export(folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "train.pbin", "val.pbin"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_softcap": 30.0}, r"model\.logit_softcap is 30\.0, but LlamaForCausalLM"),
        ({"positions": "none"}, r"model\.positions is 'none'"),
    ],
)
def test_a_model_that_no_architecture_computes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_checkpoint(tmp_path / "run", replace(tiny.MODEL, **changes))
    with pytest.raises(ValueError, match=message):
        hf.export(tmp_path / "run", tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_weights_that_are_no_numbers_leave_no_folder(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", nan=True)
    with pytest.raises(ValueError, match="logits differ from the checkpoint's by nan"):
        hf.export(tmp_path / "run", tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_its_check_finds_a_flipped_bit(exported: Path, run: Path, tmp_path: Path) -> None:
    source = hf.find_checkpoint(run, None)
    digests = hf.write_weights(tmp_path, source, layout(source.config), 10**9, "float32")
    hf.write_json(tmp_path / "config.json", json.loads((exported / "config.json").read_text()))
    assert "to the bit" in hf.check(tmp_path, source, digests, "float32")
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"final_norm\.weight is not what was written"):
        hf.check(tmp_path, source, digests, "float32")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("2KiB", 2048), ("77", 77)])
def test_sizes(text: str, size: int) -> None:
    assert hf.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5 apples", "-1GB", "0GB", "GB"])
def test_what_is_no_size(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="must be a size such as 5GB"):
        hf.parse_size(text)


def test_files_are_cut_in_order() -> None:
    assert hf.cut({"a": 4, "b": 4, "c": 9, "d": 1, "e": 7}, 8) == [["a", "b"], ["c"], ["d", "e"]]


def test_a_run_without_tokenizer_and_one_without_its_eod(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "bare")
    hf.export(tmp_path / "bare", tmp_path / "out")
    assert "the run has no tokenizer" in capsys.readouterr().out
    assert (
        not (tmp_path / "out" / "tokenizer.json").exists() and load_theirs(tmp_path / "out").config.eos_token_id is None
    )

    config = recipe(tmp_path, steps=1)
    other = loop.train(replace(config, data=replace(config.data, eod="<end>")))
    hf.export(other, tmp_path / "out2")
    assert "has no token data.eod '<end>'" in capsys.readouterr().out
    assert "eos_token" not in json.loads((tmp_path / "out2" / "tokenizer_config.json").read_text())
    write_words(other / "tokenizer.json", VOCAB | {"z": 100})
    with pytest.raises(ValueError, match=r"has token 100, but model\.vocab_size is 100"):
        hf.export(other, tmp_path / "out3")


# --------------------------------------------------------------------------------------------------------------- import


@pytest.mark.parametrize("name", ["gpt2", "llama 3", "llama 3 tied", "llama yarn", "mistral", "qwen2", "qwen3"])
def test_in_and_out_again_to_the_bit(name: str, tmp_path: Path) -> None:
    model, tokens = write_theirs(tmp_path / "theirs", MODELS[name]), some_tokens()
    hf.main(["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "runs" / "new")])
    hf.main(["export", str(tmp_path / "runs" / "new"), "--out", str(tmp_path / "ours")])
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        their_logits = model(tokens).logits
        assert_close(load_theirs(tmp_path / "ours")(tokens).logits, their_logits)
    assert_close(our_logits(tmp_path / "runs" / "new", tokens), their_logits)


def test_an_imported_run_is_a_run(exported: Path, tmp_path: Path) -> None:
    hf.import_folder(exported, tmp_path / "new")
    loaded, config = trained.load(tmp_path / "new", CPU), from_json(tmp_path / "new" / "recipe.json")
    assert loaded.folder == tmp_path / "new" / "step-00000000" and loaded.eod == "<eod>"
    assert loaded.tokenizer == tmp_path / "new" / "tokenizer.json" and config.data.tokenizer == str(loaded.tokenizer)
    assert config.folder == tmp_path / "new" and config.model == read_config(exported)
    expected = dict(read_weights(exported, config.model))
    assert all(torch.equal(loaded.params[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="new exists already"):
        hf.import_folder(exported, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_without_tokenizer_is_imported_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_theirs(tmp_path / "theirs", MODELS["qwen3"])
    hf.import_folder(tmp_path / "theirs", tmp_path / "new")
    assert "has no tokenizer.json, so the run has no tokenizer" in capsys.readouterr().out
    assert trained.load(tmp_path / "new", CPU).tokenizer is None


def test_training_on_an_import_starts_from_its_weights(run: Path, exported: Path, tmp_path: Path) -> None:
    hf.import_folder(exported, tmp_path / "new")
    imported, first = from_json(tmp_path / "new" / "recipe.json"), from_json(run / "recipe.json")
    assert imported.model_from == str(tmp_path / "new")
    data = replace(imported.data, train=first.data.train, val=first.data.val, seq_len=32, global_batch=8)
    parallel = replace(first.parallel, micro_batch=8)
    more = loop.train(
        replace(imported, name="more", data=data, parallel=parallel, eval=EvalConfig(every=1), sample=first.sample)
    )
    losses = [
        [line["val/val/loss"] for line in map(json.loads, path.open()) if "val/val/loss" in line]
        for path in (run / "metrics.jsonl", more / "metrics.jsonl")
    ]
    assert losses[1][0] == pytest.approx(losses[0][-1], rel=1e-5)


def test_a_tokenizer_that_is_larger_than_the_model_is_not_imported(exported: Path, tmp_path: Path) -> None:
    theirs = shutil.copytree(exported, tmp_path / "theirs")
    write_words(theirs / "tokenizer.json", VOCAB | {"z": 100})
    with pytest.raises(ValueError, match=r"has token 100, but model\.vocab_size is 100"):
        hf.import_folder(theirs, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_folder_that_a_run_would_take_for_a_checkpoint_is_refused(exported: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run")
    for make, source in ((hf.export, tmp_path / "run"), (hf.import_folder, exported)):
        with pytest.raises(ValueError, match="step-9 would lie among the checkpoints of a run"):
            make(source, tmp_path / "run" / "step-9")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000000"]
    hf.import_folder(exported, tmp_path / "step-9")


def test_a_full_disk_ends_an_import_in_one_line_and_leaves_nothing(exported: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "modalities.hf", "import", str(exported), "--out", str(tmp_path / "new")]
    done = subprocess.run(["bash", "-c", 'ulimit -f 1; "$@"', "bash", *command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, ""), done
    assert done.stderr.endswith("step-00000000 cannot be written ([Errno 27] File too large); is the disk full?\n")
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_chat_template_and_the_first_token_survive(exported: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for file in exported.iterdir():
        (theirs / file.name).write_bytes(file.read_bytes())
    facts = {
        "eos_token": {"content": "<eod>"},
        "bos_token": "\u0107",
        "chat_template": "{{ 1 }}",
        "add_bos_token": True,
    }
    facts |= {"unk_token": "<not there>", "pad_token": 5, "tokenizer_class": "OfAnother"}
    hf.write_json(theirs / "tokenizer_config.json", facts)
    hf.import_folder(theirs, tmp_path / "new")
    hf.export(tmp_path / "new", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert found["chat_template"] == "{{ 1 }}" and found["bos_token"] == "\u0107" and found["eos_token"] == "<eod>"
    assert "add_bos_token" not in found and "unk_token" not in found
    assert found["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 7


def test_bfloat16_in_and_out_again_to_the_bit(run: Path, tmp_path: Path) -> None:
    hf.export(run, tmp_path / "theirs", dtype="bfloat16", max_shard_size="20KB")
    hf.import_folder(tmp_path / "theirs", tmp_path / "new")
    assert trained.load(tmp_path / "new", CPU).dtype == torch.bfloat16
    hf.export(tmp_path / "new", tmp_path / "ours", dtype="bfloat16", max_shard_size="20KB")
    files = sorted((tmp_path / "theirs").glob("*.safetensors*"))
    assert len(files) == 3
    for file in (*files, tmp_path / "theirs" / "config.json"):
        assert file.read_bytes() == (tmp_path / "ours" / file.name).read_bytes()


def test_a_mistake_on_the_command_line_ends_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "modalities.hf", "import", str(tmp_path), "--out", str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path} is no Hugging Face folder: it has no config.json\n"


def test_an_import_that_fails_leaves_nothing(exported: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_bytes((exported / "config.json").read_bytes())
    with pytest.raises(ValueError, match="has no weights"):
        hf.import_folder(theirs, tmp_path / "new")
    with pytest.raises(ValueError, match="is no Hugging Face folder"):
        hf.import_folder(tmp_path / "none", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
