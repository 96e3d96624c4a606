"""Architectures of Hugging Face: equal to transformers in logits and gradients, both ways, and odd folders refused."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from modalities import presets
from modalities.families import config_from_hf, config_to_hf, layout, read_config, read_weights
from modalities.model import ModelConfig, build_skeleton
from modalities.rope import RopeScaling
from modalities.step import apply

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e3, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 16}
YARN_SET = {**YARN, "attention_factor": 1.3, "beta_fast": 4.0, "beta_slow": 0.5}
LINEAR = {"rope_type": "linear", "rope_theta": 1e3, "factor": 4.0}
GPT2 = {
    "vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
# Longer than the original context where positions are scaled, and than every window.
SEQ_LEN = 48
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gpt2 untied": {"model_type": "gpt2", **GPT2, "tie_word_embeddings": False, "activation_function": "gelu"},
    "llama 2": {"model_type": "llama", **SIZES, "num_key_value_heads": 4},
    "llama 3": {"model_type": "llama", **SIZES, "rope_parameters": LLAMA3},
    "llama 3 tied": {"model_type": "llama", **SIZES, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "llama yarn": {"model_type": "llama", **SIZES, "rope_parameters": YARN},
    "llama yarn set": {"model_type": "llama", **SIZES, "rope_parameters": YARN_SET},
    "llama linear": {"model_type": "llama", **SIZES, "rope_parameters": LINEAR},
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", **SIZES, "tie_word_embeddings": True},
    "qwen2 window": {
        "model_type": "qwen2", **SIZES, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0,
    },
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 16},
}  # fmt: skip


def write_theirs(folder: Path, facts: dict[str, Any]) -> Any:
    """A random model of transformers, saved to `folder`; every weight is large enough to make a difference."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**facts)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.normal_(mean=1.0 if param.ndim == 1 and name.endswith("weight") else 0.0, std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=MODELS, ids=lambda name: name.replace(" ", "-"))
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("theirs")
    return folder, write_theirs(folder, MODELS[request.param])


def some_tokens() -> Tensor:
    return torch.randint(100, (3, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))


def assert_close(ours: Tensor, theirs: Tensor, name: str = "") -> None:
    assert ours.shape == theirs.shape, name
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), name


def test_logits_and_gradients_are_theirs(theirs: tuple[Path, Any]) -> None:
    folder, their_model = theirs
    config, tokens = read_config(folder), some_tokens()
    model, params = build_skeleton(config), dict(read_weights(folder, config))
    assert {name: p.shape for name, p in params.items()} == {n: p.shape for n, p in model.named_parameters()}
    params = {name: p.requires_grad_() for name, p in params.items()}
    logits = apply(model, params, tokens[:, :-1], train=False)
    their_logits = their_model(tokens[:, :-1]).logits
    assert their_logits.abs().max() > 1
    assert_close(logits, their_logits)

    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    F.cross_entropy(their_logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    their_params = dict(their_model.named_parameters())
    assert layout(config).keys() == their_params.keys()
    for name, stored in layout(config).items():
        grads = [params[ours].grad for ours in stored.rows]
        assert_close(stored.join([g for g in grads if g is not None]), their_params[name].grad, name)
    their_model.zero_grad()


def test_what_was_read_is_written_to_the_bit(theirs: tuple[Path, Any], tmp_path: Path) -> None:
    folder, their_model = theirs
    config = read_config(folder)
    params = dict(read_weights(folder, config))
    written = {name: stored.join([params[ours] for ours in stored.rows]) for name, stored in layout(config).items()}
    original = load_file(folder / "model.safetensors")
    assert written.keys() == original.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, original[name]) and tensor.is_contiguous(), name

    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config, bos_token_id=0, eos_token_id=0)))
    loaded = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    expected = json.loads((folder / "config.json").read_text())
    # What it computes from others, what says who wrote it, and what no model without a window reads.
    indifferent = {"transformers_version", "use_cache", "n_inner", "max_window_layers"}
    expected |= {"rope_parameters": loaded.get("rope_parameters", {}) | expected.get("rope_parameters", {})}
    different = {key for key, value in expected.items() if loaded.get(key, {}) != value} - indifferent
    assert not different, {key: (loaded.get(key), expected[key]) for key in different}
    assert config_from_hf(loaded) == config_from_hf(config_to_hf(config))


def test_every_preset_goes_out_and_comes_back() -> None:
    found = [
        f for name, f in vars(presets).items() if callable(f) and f.__module__ == presets.__name__ and name[0] != "_"
    ]
    assert len(found) > 5
    for preset in found:
        config: ModelConfig = preset()
        whole = replace(config, num_kv_heads=config.kv_heads, head_dim=config.head_width, mlp_width=config.mlp_hidden)
        if config.positions == "learned":
            whole = replace(whole, num_kv_heads=None, head_dim=None)
        assert config_from_hf(config_to_hf(config)) == whole, preset.__name__


def test_the_rope_of_older_versions() -> None:
    llama = {"model_type": "llama", **SIZES}
    older = config_from_hf({**llama, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}})
    assert older.rope_theta == 5e5 and older.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    newer = config_from_hf({**llama, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}})
    assert newer == older
    yarn = config_from_hf({**llama, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    assert yarn.rope_scaling.original_seq_len == 64 and yarn.rope_theta == 10_000.0
    assert config_from_hf({**llama, "rope_scaling": None}).rope_scaling.kind == "none"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba', but only gpt2, llama, mistral, qwen2, qwen3 are known"),
        ({"model_type": None}, "model_type is None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, r"architectures is .*Classification.*LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias is True, but only False can be done"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but only silu, swish can be done"),
        ({"hidden_act": ["silu"]}, "hidden_act is"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*gptq"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type is 'longrope'"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "of rope_type llama3 lack low_freq_factor"),
        ({"rope_parameters": {**YARN, "mscale": 0.7}}, "mscale of rope_parameters is 0.7"),
        ({"rope_parameters": {**YARN, "truncate": False}}, "truncate of rope_parameters is False"),
        ({"rope_parameters": {"full_attention": YARN}}, "only one for all layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor of rope_parameters is 0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .*only layers alike"),
        ({"hidden_size": "32"}, "model.width is '32', but should be int"),
        ({"num_attention_heads": 5}, "model.num_heads 5 does not divide"),
        ({"rope_theta": -1.0}, "model.rope_theta is -1.0"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "layer_types is .*layers alike"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": None},
            "max_window_layers is None, but should be int",
        ),
        ({"layer_types": 5}, "layer_types is 5, but only layers alike"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is True"),
        ({"model_type": "gpt2", **GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"model_type": "gpt2", **GPT2, "scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"model_type": "gpt2", **GPT2, "activation_function": "relu"}, "activation_function is 'relu'"),
        ({"model_type": "gpt2"}, "n_layer is missing|vocab_size is missing"),
    ],
)  # fmt: skip
def test_what_our_model_does_not_do_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES} | changes))
    with pytest.raises(ValueError, match=rf"config\.json: .*({message})") as raised:
        read_config(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", [None, "{", "[]", "3"])
def test_a_folder_without_a_config(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"has no config\.json|is not JSON|should hold a JSON object"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "none"}, "model.positions is 'none', but LlamaForCausalLM, .*needs 'rope'"),
        ({"logit_softcap": 30.0}, "model.logit_softcap is 30.0"),
        ({"activation": "gelu"}, "model.activation is 'gelu', but LlamaForCausalLM, .*needs 'swiglu'"),
        ({"norm": "layernorm"}, "model.norm is 'layernorm'"),
        ({"bias": True}, "model.bias is True"),
        ({"qk_norm": True, "qkv_bias": True}, "model.qkv_bias is True, but Qwen3ForCausalLM"),
        ({"num_heads": 3, "num_kv_heads": 3, "head_dim": 8}, "model.num_heads is 3, but LlamaForCausalLM"),
        ({"positions": "learned"}, "but GPT2LMHeadModel, .*needs"),
    ],
)
def test_what_no_family_computes_is_named(changes: dict[str, Any], message: str) -> None:
    config = ModelConfig(vocab_size=100, num_layers=2, width=32, num_heads=4)
    with pytest.raises(ValueError, match=message):
        config_to_hf(replace(config, **changes))


# ------------------------------------------------------------------------------------------------------ odd folders


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    write_theirs(tmp_path, MODELS["gpt2"])
    return tmp_path


def read_all(folder: Path) -> dict[str, Tensor]:
    return dict(read_weights(folder, read_config(folder)))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_files_of_older_versions_are_read(gpt2: Path) -> None:
    """Without the prefix, with a mask as a buffer and with the tied head, as the first GPT-2 on the hub."""
    expected = read_all(gpt2)

    def older(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"], tensors["h.1.attn.masked_bias"] = torch.ones(1, 1, 64, 64), torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    rewrite(gpt2, older)
    found = read_all(gpt2)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_rows_that_pad_the_vocabulary_are_zero_and_half_precision_is_widened(gpt2: Path) -> None:
    rewrite(gpt2, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    params = read_all(gpt2)
    assert params["embed.weight"].shape == (128, 32) and not params["embed.weight"][100:].any()
    assert all(param.dtype == torch.float32 and param.is_contiguous() for param in params.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.h.1.ln_2.bias"), r"lacks the tensor transformer\.h\.1\.ln_2\.bias"),
        (lambda t: t.update(extra=torch.ones(1)), "does not account for: extra"),
        (lambda t: t.update({"transformer.h.2.ln_1.bias": torch.ones(32)}), r"not account for: transformer\.h\.2\."),
        (
            lambda t: t.update({"transformer.wpe.weight": torch.ones(63, 32)}),
            r"wpe\.weight is F32 \[63, 32\], but should be F32, F16 or BF16 \[64, 32\]",
        ),
        (lambda t: t.update({"transformer.wpe.weight": torch.ones(64, 32, dtype=torch.int8)}), r"wpe\.weight is I8"),
        (lambda t: t.update({"lm_head.weight": torch.ones(100, 32)}), r"lm_head\.weight differs from transformer\.wte"),
    ],
    ids=["missing", "unknown", "layer too many", "shape", "quantised", "head not tied"],
)
def test_a_wrong_tensor_is_named(gpt2: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    rewrite(gpt2, change)
    with pytest.raises(ValueError, match=message):
        read_all(gpt2)


def test_a_broken_file_is_named(gpt2: Path) -> None:
    file = gpt2 / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        read_all(gpt2)
    file.rename(gpt2 / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin alone.*save_pretrained"):
        read_all(gpt2)
    (gpt2 / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        read_all(gpt2)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_theirs(tmp_path / "whole", MODELS["llama 3"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def test_shards_are_read_as_one(sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole, found = read_all(sharded.parent / "whole"), read_all(sharded)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.clear(), "is broken: it should have a weight_map"),
        (lambda index: index["weight_map"].update(a="../secret.safetensors"), "is broken"),
        (lambda index: index["weight_map"].update(a="none.safetensors"), r"none\.safetensors cannot be read"),
        (lambda index: index["weight_map"].update(a=min(index["weight_map"].values())), "has the tensor a in .*lacks"),
    ],
    ids=["no map", "path", "no file", "not in it"],
)
def test_a_wrong_index_is_named(sharded: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        read_all(sharded)


def test_a_tensor_in_two_shards_is_named(sharded: Path) -> None:
    files = sorted(sharded.glob("*.safetensors"))
    name, tensor = next(iter(load_file(files[0]).items()))
    save_file(load_file(files[1]) | {name: tensor}, files[1])
    with pytest.raises(ValueError, match=rf"the tensor {name} is in .* and in "):
        read_all(sharded)
