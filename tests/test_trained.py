"""What `load` finds: runs, checkpoints, Hugging Face folders; and whose greedy text is transformers' own."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_generate import rows, write_tokenizer
from tokenizers import Tokenizer

from modalities import checkpoint, durable, loop
from modalities.checkpoint import CheckpointConfig
from modalities.generate import GenerateConfig, make_decoder
from modalities.trained import end_tokens, find, load, load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the steps 1 and 2 of a run with a tokenizer, in bf16."""
    folder = tmp_path_factory.mktemp("run")
    base = tiny.recipe(folder, steps=2, checkpoint=CheckpointConfig(every=1))
    data = replace(base.data, tokenizer=str(write_tokenizer(folder / "tokenizer.json")), eod="<99>")
    recipe = replace(base, data=data, parallel=replace(base.parallel, param_dtype="bfloat16"))
    return loop.train(recipe)


def test_a_run_is_its_newest_checkpoint(run: Path) -> None:
    newest, first = load(run, CPU), load(run / "step-00000001", CPU)
    assert newest.folder == run / "step-00000002" and first.folder == run / "step-00000001"
    assert newest.tokenizer == run / "tokenizer.json" and newest.eod == "<99>"
    assert newest.dtype == torch.bfloat16 and newest.context == 64
    assert newest.recipe is not None and newest.recipe["steps"] == 2
    assert {name: p.shape for name, p in newest.params.items()} == {
        name: p.shape for name, p in newest.model.named_parameters()
    }
    assert all(p.dtype == torch.float32 for p in newest.params.values())
    assert not torch.equal(newest.params["embed.weight"], first.params["embed.weight"])


def test_a_damaged_checkpoint_is_passed_over_in_a_run_and_refused_by_name(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    with (copy / "step-00000002" / ".metadata").open("ab") as file:
        file.write(b"x")
    assert load(copy, CPU).folder == copy / "step-00000001"
    with pytest.raises(ValueError, match="step-00000002 is damaged"):
        load(copy / "step-00000002", CPU)


def test_the_backend_of_the_training_is_not_needed(run: Path, tmp_path: Path) -> None:
    """A model trained with flash attention on a GPU can be used on a CPU."""
    copy = shutil.copytree(run / "step-00000002", tmp_path / "step-00000002")
    recipe = json.loads((copy / "recipe.json").read_text())
    recipe["model"]["attention"] = "flash"
    (copy / "recipe.json").write_text(json.dumps(recipe))
    (copy / checkpoint.MANIFEST).unlink()
    durable.write_manifest(copy, {"step": 2, "samples": 16}, durable.hash_files(copy.iterdir()))
    assert load(copy, CPU).model.config.attention == "auto"


def test_any_other_path_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text("{}")
    for path in (tmp_path, tmp_path / "none", tmp_path / "file.json"):
        with pytest.raises(ValueError, match=rf"{path} holds no checkpoint; give a run") as raised:
            load(path, CPU)
        assert "\n" not in str(raised.value)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json", size=101)
    with pytest.raises(ValueError, match=r"has token 100, but model\.vocab_size is 100"):
        load_tokenizer(path, 100)
    with pytest.raises(ValueError, match=r"none\.json is missing"):
        load_tokenizer(tmp_path / "none.json", 100)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "broken.json", 100)


def test_a_tokenizer_cuts_and_pads_no_prompt(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path))
    assert load_tokenizer(path, 100).encode("<1><2><3>").ids == [1, 2, 3]


# --------------------------------------------------------------------------------------------------------- Hugging Face

SHAPE = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
LLAMA |= {"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 99}
GPT2: dict[str, Any] = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"initializer_range": 0.2, "bos_token_id": 99, "eos_token_id": 99}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2", GPT2),
    "Llama": ("Llama", LLAMA),
    "Mistral": ("Mistral", {**LLAMA, "sliding_window": 9, "head_dim": 8}),
    "Qwen2": ("Qwen2", LLAMA),
    "Qwen3": ("Qwen3", {**LLAMA, "head_dim": 16}),
}


def random_model(name: str, folder: Path) -> Any:
    """A random model of transformers, saved with a tokenizer."""
    import transformers

    class_name, fields = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{class_name}Config")(**fields)
    head = "LMHeadModel" if class_name == "GPT2" else "ForCausalLM"
    # Its own sliding window is known to be right in the eager form.
    model = getattr(transformers, class_name + head)._from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    file = write_tokenizer(folder / "words.json")
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<99>").save_pretrained(folder)
    file.unlink()
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    model = random_model(name, tmp_path)
    trained = load(tmp_path, CPU)
    assert trained.recipe is None and trained.context == 64 and trained.dtype == torch.float32
    assert trained.eod == "<99>" and trained.tokenizer is not None
    assert end_tokens(trained, load_tokenizer(trained.tokenizer, 100)) == {99}
    decoder = make_decoder(trained.model, trained.params, trained.dtype, CPU)
    prompts = [[5, 17, 3, 42, 8, 77, 23], [11, 64], [30, 31, 32, 33]]
    for penalty in (1.0, 1.3):
        how = GenerateConfig(num_tokens=50, temperature=0, repetition_penalty=penalty)
        ours = rows(decoder, prompts, how, context=64, is_over=lambda row, token: token == 99)
        assert any(len(set(text)) > 10 for text in ours)
        for prompt, text in zip(prompts, ours, strict=True):
            theirs = model.generate(
                torch.tensor([prompt]), max_new_tokens=50, do_sample=False, repetition_penalty=penalty, pad_token_id=0
            )
            assert text == [token for token in theirs[0, len(prompt) :].tolist() if token != 99]


def test_a_folder_says_its_dtype_and_where_texts_end(tmp_path: Path) -> None:
    random_model("Llama", tmp_path)
    changes = {"dtype": "bfloat16", "eos_token_id": 7}
    for name, added in (("config.json", changes), ("generation_config.json", {"eos_token_id": [9, 99]})):
        path = tmp_path / name
        path.write_text(json.dumps(json.loads(path.read_text()) | added))
    trained = load(tmp_path, CPU)
    assert trained.dtype == torch.bfloat16 and trained.tokenizer is not None
    tokenizer = load_tokenizer(trained.tokenizer, 100)
    assert end_tokens(trained, tokenizer) == {9, 99}  # as transformers' generate has it
    (tmp_path / "generation_config.json").unlink()
    assert end_tokens(trained, tokenizer) == {7}
    (tmp_path / "config.json").unlink()
    assert end_tokens(trained, tokenizer) == {99}


@pytest.mark.parametrize(
    ("files", "eod"),
    [
        ({"tokenizer_config.json": {"eos_token": "<5>"}, "config.json": {"eos_token_id": 0}}, "<5>"),
        ({"tokenizer_config.json": {"eos_token": {"content": "<5>", "lstrip": False}}}, "<5>"),
        ({"generation_config.json": {"eos_token_id": [7, 0]}, "config.json": {"eos_token_id": 0}}, "<7>"),
        ({"tokenizer_config.json": {"eos_token": None}, "config.json": {"eos_token_id": 0}}, "<0>"),
        ({"config.json": {"eos_token_id": 5000}}, None),
        ({"config.json": {"eos_token_id": -1}}, None),
        ({}, None),
    ],
)
def test_the_token_that_ends_texts_is_found(tmp_path: Path, files: dict[str, Any], eod: str | None) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    for name, content in ({"config.json": {}} | files).items():
        facts = {"model_type": "llama", **LLAMA, "eos_token_id": None} if name == "config.json" else {}
        (tmp_path / name).write_text(json.dumps(facts | content))
    assert find(tmp_path).eod == eod


@pytest.mark.parametrize(
    "name, facts",
    [
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", {"eos_token": {"lstrip": False}}),
        ("generation_config.json", {"eos_token_id": ["<5>"]}),
        ("generation_config.json", {"eos_token_id": {}}),
    ],
)
def test_an_end_of_a_wrong_type_is_named(tmp_path: Path, name: str, facts: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA}))
    (tmp_path / name).write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=rf"{name}: eos_token(_id)? is .*, but should be") as raised:
        find(tmp_path)
    assert "\n" not in str(raised.value)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ValueError, match="mamba"):
        load(tmp_path, CPU)
