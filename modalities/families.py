"""The architectures that Hugging Face knows and our Transformer can be: `config.json` and tensor names, both ways.

Written as tables, one a family: our field ↔ theirs, our parameter ↔ theirs. What our model does not do is refused by
name, for a field passed over gives a model that computes something else. Nothing here needs transformers.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modalities.config import from_dict, printable
from modalities.model import ModelConfig, build_skeleton

REQUIRED = object()
SLIDING, FULL = "sliding_attention", "full_attention"
MISTRAL_WINDOW = 4096  # what transformers takes where config.json says nothing


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of transformers."""

    model_type: str
    architecture: str
    """The class with a language-modelling head."""
    fields: dict[str, tuple[str, Any]]
    """Our field → theirs, and what they take where config.json leaves it out."""
    activations: dict[str, str]
    """Their name of the activation → ours; the first that fits is written."""
    implied: dict[str, Any]
    """Our fields that have this one value in the family."""
    refused: dict[str, Any]
    """Their fields that would change what is computed, with the only value that we can do."""
    base: str
    """What the names of their tensors begin with, the head's excepted."""
    modules: dict[str, str]
    """Our module → theirs. Several of ours in one of theirs are stored in this order, one under another."""
    transposed: bool = False
    """Whether the weights of linear layers are stored as [in, out]."""


GPT2_MODULES = {
    "embed": "wte",
    "positions": "wpe",
    "blocks.{i}.attn_norm": "h.{i}.ln_1",
    "blocks.{i}.attn.wq": "h.{i}.attn.c_attn",
    "blocks.{i}.attn.wk": "h.{i}.attn.c_attn",
    "blocks.{i}.attn.wv": "h.{i}.attn.c_attn",
    "blocks.{i}.attn.wo": "h.{i}.attn.c_proj",
    "blocks.{i}.mlp_norm": "h.{i}.ln_2",
    "blocks.{i}.mlp.w_up": "h.{i}.mlp.c_fc",
    "blocks.{i}.mlp.w_down": "h.{i}.mlp.c_proj",
    "final_norm": "ln_f",
}
LLAMA_MODULES = {
    "embed": "embed_tokens",
    "blocks.{i}.attn_norm": "layers.{i}.input_layernorm",
    "blocks.{i}.attn.wq": "layers.{i}.self_attn.q_proj",
    "blocks.{i}.attn.wk": "layers.{i}.self_attn.k_proj",
    "blocks.{i}.attn.wv": "layers.{i}.self_attn.v_proj",
    "blocks.{i}.attn.wo": "layers.{i}.self_attn.o_proj",
    "blocks.{i}.attn.q_norm": "layers.{i}.self_attn.q_norm",
    "blocks.{i}.attn.k_norm": "layers.{i}.self_attn.k_norm",
    "blocks.{i}.mlp_norm": "layers.{i}.post_attention_layernorm",
    "blocks.{i}.mlp.w_gate": "layers.{i}.mlp.gate_proj",
    "blocks.{i}.mlp.w_up": "layers.{i}.mlp.up_proj",
    "blocks.{i}.mlp.w_down": "layers.{i}.mlp.down_proj",
    "final_norm": "norm",
}
HEAD = "lm_head"
PADDED = ("embed.weight", "head.weight")  # with rows of ours that pad the vocabulary
# Files of older versions hold these too, although they can be computed.
BUFFERS = re.compile(r"(.*\.)?(attn\.(masked_)?bias|rotary_emb\.inv_freq)")

PLAIN = {"qkv_bias": False, "qk_norm": False, "window": None, "logit_softcap": 0.0}
GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    fields={
        "vocab_size": ("vocab_size", REQUIRED),
        "num_layers": ("n_layer", REQUIRED),
        "width": ("n_embd", REQUIRED),
        "num_heads": ("n_head", REQUIRED),
        "mlp_width": ("n_inner", None),
        "max_seq_len": ("n_positions", 1024),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tied": ("tie_word_embeddings", True),
        "embed_dropout": ("embd_pdrop", 0.1),
        "attn_dropout": ("attn_pdrop", 0.1),
        "resid_dropout": ("resid_pdrop", 0.1),
        "init_std": ("initializer_range", 0.02),
        "activation": ("activation_function", "gelu_new"),
    },
    activations={"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
    implied=PLAIN | {"norm": "layernorm", "positions": "learned", "bias": True},
    refused={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    base="transformer.",
    modules=GPT2_MODULES,
    transposed=True,
)
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields={
        "vocab_size": ("vocab_size", REQUIRED),
        "num_layers": ("num_hidden_layers", REQUIRED),
        "width": ("hidden_size", REQUIRED),
        "num_heads": ("num_attention_heads", REQUIRED),
        "num_kv_heads": ("num_key_value_heads", None),
        "head_dim": ("head_dim", None),
        "mlp_width": ("intermediate_size", REQUIRED),
        "max_seq_len": ("max_position_embeddings", 2048),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "tied": ("tie_word_embeddings", False),
        "attn_dropout": ("attention_dropout", 0.0),
        "init_std": ("initializer_range", 0.02),
        "activation": ("hidden_act", "silu"),
    },
    activations={"silu": "swiglu", "swish": "swiglu"},
    implied=PLAIN | {"norm": "rmsnorm", "positions": "rope", "bias": False},
    refused={"attention_bias": False, "mlp_bias": False},
    base="model.",
    modules=LLAMA_MODULES,
)
# In the next three the window is read and written by functions of its own.
MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=LLAMA.fields | {"max_seq_len": ("max_position_embeddings", 131_072)},
    implied={key: value for key, value in LLAMA.implied.items() if key != "window"},
)
QWEN2 = replace(
    MISTRAL,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=LLAMA.fields | {"max_seq_len": ("max_position_embeddings", 32_768)},
    implied=MISTRAL.implied | {"qkv_bias": True},
)
QWEN3 = replace(
    MISTRAL,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=QWEN2.fields | {"head_dim": ("head_dim", 128)},
    implied=MISTRAL.implied | {"qk_norm": True},
)
FAMILIES = {family.model_type: family for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3)}
ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_seq_len", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_seq_len", "beta_fast", "beta_slow", "attention_factor"),
}
ROPE_REQUIRED = {"factor", "low_freq_factor", "high_freq_factor"}
ORIGINAL = "original_max_position_embeddings"  # their name of `original_seq_len`


def family_of(config: ModelConfig) -> Family:
    """The family that computes what `config` does; a ValueError names the field that none has.

    Dropout counts for nothing here: it is off whenever an exported model is used.
    """
    if config.positions == "learned":
        family = GPT2
    elif config.qk_norm or config.qkv_bias:
        family = QWEN3 if config.qk_norm else QWEN2
    else:
        family = LLAMA if config.window is None else MISTRAL
    unlike = {name: value for name, value in family.implied.items() if getattr(config, name) != value}
    if config.activation not in family.activations.values():
        unlike["activation"] = next(iter(family.activations.values()))
    if family is GPT2 and config.kv_heads != config.num_heads:
        unlike["num_kv_heads"] = config.num_heads
    # Llama's own check wants it so, whatever head_dim is.
    whole = config.width % config.num_heads == 0
    if (family is GPT2 and config.head_width * config.num_heads != config.width) or (family is LLAMA and not whole):
        unlike["num_heads"] = "a divisor of model.width, and model.head_dim None"
    for name, value in unlike.items():
        raise ValueError(
            f"model.{name} is {getattr(config, name)!r}, but {family.architecture}, the nearest of the Hugging Face "
            f"architectures that we know, needs {value!r}"
        )
    return family


# --------------------------------------------------------------------------------------------------------- config.json


def read_config(folder: Path) -> ModelConfig:
    """The model that the `config.json` in `folder` describes; ValueError for what is not known or cannot be done."""
    path = folder / "config.json"
    try:
        return config_from_hf(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no Hugging Face folder: it has no config.json") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def config_from_hf(found: Any) -> ModelConfig:
    """The ModelConfig of what a `config.json` holds."""
    if not isinstance(found, dict):
        raise ValueError("it should hold a JSON object")
    model_type, architectures = found.get("model_type"), found.get("architectures")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ValueError(f"model_type is {_shown(model_type)}, but only {', '.join(FAMILIES)} are known")
    if architectures and architectures != [family.architecture]:
        raise ValueError(f"architectures is {_shown(architectures)}, but only {family.architecture} is known")
    for name, value in ({"quantization_config": None} | family.refused).items():
        if found.get(name, value) not in (value, None):
            raise ValueError(f"{name} is {_shown(found[name])}, but only {_shown(value)} can be done")
    values = dict(family.implied)
    for ours, (theirs, default) in family.fields.items():
        if found.get(theirs, default) is REQUIRED:
            raise ValueError(f"{theirs} is missing")
        values[ours] = found.get(theirs, default)
    act, known = values["activation"], family.activations
    if str(act) not in known:
        raise ValueError(f"{family.fields['activation'][0]} is {_shown(act)}, but only {', '.join(known)} can be done")
    values["activation"] = known[act]
    config = from_dict(ModelConfig, values, "model")
    if config.positions == "learned":
        return config
    theta, scaling = _read_rope(found, config.max_seq_len)
    window = _read_window(found, family, config.num_layers)
    return from_dict(ModelConfig, values | {"rope_theta": theta, "rope_scaling": scaling, "window": window}, "model")


def _read_rope(found: dict[str, Any], max_seq_len: int) -> tuple[Any, dict[str, Any]]:
    """(theta, the fields of RopeScaling) from `rope_parameters` of transformers 5, or what older versions wrote."""
    rope = found.get("rope_scaling") or found.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"rope_parameters is {_shown(rope)}, but only one for all layers can be done")
    rope = {"partial_rotary_factor": found.get("partial_rotary_factor")} | rope
    theta = rope.get("rope_theta") or found.get("rope_theta") or 10_000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if str(kind) not in ROPE_FIELDS:
        raise ValueError(f"rope_type is {_shown(kind)}, but only {', '.join(ROPE_FIELDS)} can be done")
    for name, value in {"partial_rotary_factor": 1, "mscale": 0, "mscale_all_dim": 0, "truncate": True}.items():
        if rope.get(name, value) not in (value, None):
            raise ValueError(f"{name} of rope_parameters is {_shown(rope[name])}, but only {value} can be done")
    # Where several say it, the first holds, as in transformers.
    rope["original_seq_len"] = found.get(ORIGINAL) or rope.get(ORIGINAL) or max_seq_len
    scaling = {name: rope[name] for name in ROPE_FIELDS[kind] if rope.get(name) is not None}
    for name in ROPE_FIELDS[kind]:
        if name in ROPE_REQUIRED and name not in scaling:
            raise ValueError(f"rope_parameters of rope_type {kind} lack {name}")
    return theta, {"kind": "none" if kind == "default" else kind} | scaling


def _read_window(found: dict[str, Any], family: Family, num_layers: int) -> Any:
    """The sliding window of all layers [tokens], or None; layers that differ are refused."""
    window, first = None, 0
    if family is MISTRAL:
        window = found.get("sliding_window", MISTRAL_WINDOW)
    elif family is not LLAMA and found.get("use_sliding_window"):
        window, first = found.get("sliding_window", MISTRAL_WINDOW), found.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise ValueError(f"max_window_layers is {_shown(first)}, but should be int")
    derived = [SLIDING if window is not None and i >= first else FULL for i in range(num_layers)]
    kinds = found.get("layer_types") or derived
    # Qwen alone reads `layer_types`; elsewhere they may only repeat what holds anyway.
    if kinds not in ([SLIDING] * num_layers, [FULL] * num_layers) or (family in (LLAMA, MISTRAL) and kinds != derived):
        kinds = sorted(set(map(str, kinds))) if isinstance(kinds, list) else kinds
        raise ValueError(f"layer_types is {_shown(kinds)}, but only layers alike can be done")
    return window if kinds[0] == SLIDING else None


def config_to_hf(
    config: ModelConfig, dtype: str = "float32", bos_token_id: int | None = None, eos_token_id: int | None = None
) -> dict[str, Any]:
    """The `config.json` of `config`, as transformers 5 and 4 both read it. `dtype`: that of the stored tensors."""
    family = family_of(config)
    values = {name: getattr(config, name) for name in family.fields}
    values["activation"] = next(theirs for theirs, ours in family.activations.items() if ours == config.activation)
    values["mlp_width"] = config.mlp_hidden
    if family is not GPT2:
        values |= {"num_kv_heads": config.kv_heads, "head_dim": config.head_width}
    found = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{family.fields[name][0]: value for name, value in values.items()},
        **family.refused,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": dtype,
        "torch_dtype": dtype,  # for transformers 4
    }
    if family is GPT2:
        return found
    kind = config.rope_scaling.kind.replace("none", "default")
    rope: dict[str, Any] = {"rope_type": kind}
    for name in ROPE_FIELDS[kind]:
        rope[ORIGINAL if name == "original_seq_len" else name] = getattr(config.rope_scaling, name)
    if not rope.get("attention_factor", 1):
        del rope["attention_factor"]  # theirs to compute, as it was ours
    found |= {"rope_theta": config.rope_theta, "rope_parameters": {"rope_theta": config.rope_theta, **rope}}
    if kind != "default":
        found["rope_scaling"] = rope  # for transformers 4; 5 takes it for the same
    if family is MISTRAL:
        found["sliding_window"] = config.window
    elif family is not LLAMA:
        found |= {"use_sliding_window": config.window is not None, "max_window_layers": 0}
        found["sliding_window"] = config.window
    return found


def _shown(value: Any) -> str:
    return printable(repr(value))


# -------------------------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class Stored:
    """A tensor of a Hugging Face folder: rows of our parameters, one under another, and then perhaps transposed."""

    rows: dict[str, int]
    """Our parameters, and how many rows of each are stored: those that pad the vocabulary are not."""
    shape: tuple[int, ...]
    """As it is stored."""
    transposed: bool

    def join(self, params: Sequence[Tensor]) -> Tensor:
        """The tensor of our whole parameters, in the order of `rows`; a view of the parameter where it can be."""
        parts = [param[:rows] for param, rows in zip(params, self.rows.values(), strict=True)]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (joined.T if self.transposed else joined).contiguous()

    def split(self, tensor: Tensor, padded_rows: int) -> Iterator[tuple[str, Tensor]]:
        """Our parameters by name, fp32; one that is alone gets rows of zeros up to `padded_rows`."""
        parts = (tensor.T if self.transposed else tensor).split(list(self.rows.values()))
        for (name, rows), part in zip(self.rows.items(), parts, strict=True):
            # A copy, for what is mapped to a file must not change with the file.
            whole = torch.zeros(padded_rows if name in PADDED else rows, *part.shape[1:])
            whole[:rows] = part
            yield name, whole


def layout(config: ModelConfig) -> dict[str, Stored]:
    """The tensors of a Hugging Face folder by name, in the order of our parameters; a tied head is not stored."""
    family = family_of(config)
    rows: dict[str, dict[str, int]] = {}
    columns: dict[str, tuple[int, ...]] = {}
    for name, param in build_skeleton(config).named_parameters():
        module, kind = name.rsplit(".", 1)
        number = "".join(re.findall(r"^blocks\.(\d+)", module))
        pattern = re.sub(r"^blocks\.\d+", "blocks.{i}", module)
        theirs = HEAD if module == "head" else family.base + family.modules[pattern].replace("{i}", number)
        stored = config.vocab_size if name in PADDED else len(param)
        rows.setdefault(f"{theirs}.{kind}", {})[name] = stored
        columns[f"{theirs}.{kind}"] = param.shape[1:]
    found = {}
    for theirs, parts in rows.items():
        shape = (sum(parts.values()), *columns[theirs])
        # The matrices of a block are those of its linear layers.
        transposed = family.transposed and len(shape) == 2 and next(iter(parts)).startswith("blocks")
        found[theirs] = Stored(parts, shape[::-1] if transposed else shape, transposed)
    return found


def read_weights(folder: Path, config: ModelConfig, only: set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Our parameters, fp32, in our shapes (padded by rows of 0), a stored tensor at a time; those that hold `only`.

    Everything is checked before the first is read: ValueError for a tensor that is missing, twice there, unknown, of
    another shape or quantised, and for a head that should be the embedding and is not.
    """
    from safetensors import safe_open

    files, stored, base = _files(folder), layout(config), family_of(config).base
    if not any(name.startswith(base) for name in files):  # saved without its head's class
        stored = {name.removeprefix(base): tensor for name, tensor in stored.items()}
    embed = next(name for name, tensor in stored.items() if "embed.weight" in tensor.rows)
    tied_head = f"{HEAD}.weight" if config.tied and f"{HEAD}.weight" in files else None
    for name in stored:
        if name not in files:
            raise ValueError(f"{folder} lacks the tensor {name}")
    for name, (file, shape, dtype) in files.items():
        expected = stored[embed if name == tied_head else name].shape if name in stored or name == tied_head else None
        if expected is None and not BUFFERS.fullmatch(name):
            raise ValueError(f"{file} has a tensor that its config.json does not account for: {printable(name)}")
        if expected is not None and (shape != expected or dtype not in ("F32", "F16", "BF16")):
            raise ValueError(
                f"{file}: {printable(name)} is {dtype} {list(shape)}, but should be F32, F16 or BF16 {list(expected)}"
            )
    if tied_head is not None:
        with safe_open(files[tied_head][0], "pt") as one, safe_open(files[embed][0], "pt") as other:
            if not torch.equal(one.get_tensor(tied_head), other.get_tensor(embed)):
                raise ValueError(f"{folder}: {tied_head} differs from {embed}, although config.json says they are tied")
    for name, (file, _, _) in files.items():
        if name in stored and (only is None or only & stored[name].rows.keys()):
            # Opened anew for each, for what was read of a file stays mapped, and counts as memory, until it is closed.
            with safe_open(file, "pt") as tensors:
                yield from stored[name].split(tensors.get_tensor(name), config.padded_vocab_size)


def _files(folder: Path) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """(file, shape, dtype) of every tensor in a folder's safetensors."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        paths, listed = [folder / "model.safetensors"], None
    elif index.is_file():
        listed = _read_index(index)
        paths = [folder / file for file in sorted(set(listed.values()))]
    elif any(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} has its weights in pytorch_model.bin alone, a format that can carry code; save it again with "
            "transformers (from_pretrained, then save_pretrained), which writes model.safetensors"
        )
    else:
        raise ValueError(f"{folder} has no weights: neither model.safetensors nor {index.name}")
    found: dict[str, tuple[Path, tuple[int, ...], str]] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (it is no dict)
                    if name in found:
                        raise ValueError(f"the tensor {printable(name)} is in {found[name][0]} and in {path}")
                    facts = tensors.get_slice(name)
                    found[name] = path, tuple(facts.get_shape()), facts.get_dtype()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}; copy it again") from None
    for name, file in (listed or {}).items():
        if name not in found or found[name][0].name != file:
            raise ValueError(f"{index} has the tensor {printable(name)} in {printable(file)}, which lacks it")
    return found


def _read_index(path: Path) -> dict[str, str]:
    """Tensor → file as the index of a sharded folder says."""
    try:
        listed = json.loads(path.read_text())["weight_map"]
        # A name with a path in it would lead out of the folder.
        if all(Path(file).name == file for file in listed.values()):
            return listed
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} is broken: it should have a weight_map from tensors to files beside it")
