"""Hugging Face folders both ways: `python -m modalities.hf export RUN --out DIR`, and `import DIR --out RUN`.

And `average`, whose models may be either.

An export reads a sharded checkpoint one tensor at a time, never the optimizer's state, and checks itself before its
folder appears. It needs torch, safetensors and tokenizers; transformers is what others then open the folder with.
"""

import functools
import hashlib
import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modalities import __version__, checkpoint, cli, families, log, mup, trained
from modalities.adopt import adopt, as_json, folder_beside, refuse_out
from modalities.average import average
from modalities.model import ModelConfig, build_skeleton, num_params
from modalities.optim import Params
from modalities.trained import Found

Dtype = Literal["float32", "bfloat16"]
SAFETENSORS = {"float32": "F32", "bfloat16": "BF16"}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# What is kept of a `tokenizer_config.json`, beside the chat template; the rest is for tokenizers of another class.
TOKENS = {f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
# Of the largest logit: what a rounding of the weights to 8 bits may cost; without it the logits are the same.
LOGITS_BOUND = {"float32": 1e-6, "bfloat16": 0.1}


# --------------------------------------------------------------------------------------------------------------- export


def export(
    run: Path,
    /,
    out: Path,
    step: int | None = None,
    max_shard_size: str = "5GB",
    dtype: Dtype = "float32",
    ema: bool = False,
) -> None:
    """Write a checkpoint as a folder that transformers loads.

    Args:
        run: A run's folder (its newest checkpoint is used), or a checkpoint.
        out: The folder to be made.
        step: The run's checkpoint of this step.
        max_shard_size: Largest weights file, such as 5GB or 300MB; a tensor that is larger has a file of its own.
        dtype: Of the weights; float32 keeps them to the bit.
        ema: The running mean of the weights that the run kept (ema.decay), not they.
    """
    refuse_out(out)
    limit, source = parse_size(max_shard_size), find_checkpoint(run, step, ema)
    stored = families.layout(source.config)
    text, facts = text_files(source)
    standard = mup.standard(source.config)
    config = families.config_to_hf(standard, dtype, facts.get("bos_token_id"), facts.get("eos_token_id"))
    with folder_beside(out) as part:
        digests = write_weights(part, source, stored, limit, dtype)
        write_json(part / "config.json", config)
        write_json(part / "generation_config.json", facts)
        for name, content in text.items():
            (part / name).write_bytes(content)
        card = model_card(source, count(stored), config["architectures"][0], out.resolve().name)
        (part / "README.md").write_text(card)
        checked = check(part, source, digests, dtype)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    kind = f"{config['architectures'][0]} of {count(stored):,} parameters"
    print(f"{out}: {kind} from {source.folder}, {size / 1e6:,.1f} MB of {dtype}\nchecked: {checked}")
    if "tokenizer.json" not in text:
        print("the run has no tokenizer, so the folder has none either")
    elif "eos_token_id" not in facts:
        print(f"its tokenizer has no token data.eod {source.eod!r}, so generation will not end by one")


def find_checkpoint(run: Path, step: int | None, ema: bool = False) -> Found:
    """The verified checkpoint that `run` and `step` mean."""
    if step is not None and (run / checkpoint.MANIFEST).exists():
        raise ValueError(f"{run} is one checkpoint already; leave --step out, or give the run's folder")
    folder = run if step is None else run / f"step-{step:08}"
    if step is not None and not folder.is_dir():
        steps = ", ".join(f"{int(path.name[5:])}" for path in sorted(run.glob("step-*")) if path.name[5:].isdigit())
        raise ValueError(f"{run} has no checkpoint of step {step}; it has {steps or 'none'}")
    found = trained.find(folder, ema)
    if found.recipe is None:
        raise ValueError(f"{run} is a Hugging Face folder already; give a run (runs/<name>) or a checkpoint in it")
    return found


def parse_size(text: str) -> int:
    """Bytes that "5GB", "300 MB" or "2GiB" means."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B|)", text.strip().upper())
    if match is None or not float(match[1]):
        raise ValueError(f"--max-shard-size is {text!r}, but must be a size such as 5GB or 300MB")
    return int(float(match[1]) * UNITS[match[2]])


def write_weights(
    folder: Path, source: Found, stored: dict[str, families.Stored], limit: int, dtype: Dtype
) -> dict[str, str]:
    """Write the weights and, where they are several files, the index; the digest of each of our parameters as written.

    In memory is one stored tensor, and what it is read and made from.
    """
    shapes = shapes_of(source.config)
    digests = {}

    def read(name: str) -> Tensor:
        params = []
        for ours, rows in stored[name].rows.items():
            param = checkpoint.load_params(source.folder, {ours: torch.empty(shapes[ours])}, source.weights)[ours]
            param = mup.scaled(param[:rows], mup.folded_multiple(source.config, ours))
            params.append(param.to(getattr(torch, dtype)))
            digests[ours] = digest(params[-1])
        return stored[name].join(params)

    sizes = {name: math.prod(tensor.shape) * getattr(torch, dtype).itemsize for name, tensor in stored.items()}
    shards = cut(sizes, limit)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(names, shards, strict=True):
        write_safetensors(folder / file, {name: stored[name].shape for name in shard}, SAFETENSORS[dtype], sizes, read)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    return digests


def cut(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in their order, in groups of at most `limit` bytes; what is larger by itself is alone."""
    groups, room = list[list[str]](), 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def write_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, sizes: dict[str, int], read: Callable[[str], Tensor]
) -> None:
    """A file of the tensors that `read` gives, one at a time; `sizes` are theirs [bytes].

    The format: 8 bytes with the length of a JSON header, the header, then the data without gaps
    (https://github.com/huggingface/safetensors). The library's own writer wants all tensors of a file in memory.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + sizes[name]]}
        end += sizes[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in shapes:
            file.write(as_bytes(read(name)))


def as_bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(as_bytes(tensor)).hexdigest()


def text_files(source: Found) -> tuple[dict[str, bytes], dict[str, Any]]:
    """(files that make the tokenizer, by name; the ids that begin and end texts). Nothing for a run without one."""
    if source.tokenizer is None:
        return {}, {}
    tokenizer = trained.load_tokenizer(source.tokenizer, source.config.vocab_size)
    # The run's own copy lies in its folder, and what came with the original beside that.
    places = [source.tokenizer.parent, Path(recipe_of(source)["data"]["tokenizer"]).parent]
    known = next(filter(None, (trained.read_json(place / "tokenizer_config.json") for place in places)), {})

    def id_of(token: Any) -> int | None:
        """`tokenizer_config.json` may hold a token with its flags."""
        text = token.get("content") if isinstance(token, dict) else token
        return tokenizer.token_to_id(text) if isinstance(text, str) else None

    # A token that is not there would become a new one, of an id that the model lacks.
    kept = {key: value for key, value in known.items() if key in TOKENS and id_of(value) is not None}
    eod = source.eod if id_of(source.eod) is not None else None
    # Documents in training come after the end of another: that token begins a text where no other does.
    kept = {"bos_token": eod} | kept | {"eos_token": eod}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": source.config.max_seq_len,
        "clean_up_tokenization_spaces": False,
        **{key: value for key, value in kept.items() if value is not None},
    }
    if known.get("chat_template"):
        config["chat_template"] = known["chat_template"]
    files = {"tokenizer.json": source.tokenizer.read_bytes(), "tokenizer_config.json": as_json(config)}
    for place in places:
        if (place / "chat_template.jinja").is_file():
            files.setdefault("chat_template.jinja", (place / "chat_template.jinja").read_bytes())
    ids = {f"{kind}_id": id_of(kept[kind]) for kind in ("bos_token", "eos_token")}
    # What fills up a batch of texts may be any token, but must be one.
    ids["pad_token_id"] = ids["eos_token_id"]
    return files, {name: found for name, found in ids.items() if found is not None}


def count(stored: dict[str, families.Stored]) -> int:
    """Parameters without the rows that pad our vocabulary."""
    return sum(math.prod(tensor.shape) for tensor in stored.values())


def model_card(source: Found, num_params: int, architecture: str, title: str) -> str:
    """README.md: what the model is, its last losses, how it is loaded, and the recipe."""
    recipe, manifest = recipe_of(source), json.loads((source.folder / checkpoint.MANIFEST).read_text())
    tokens = manifest["samples"] * recipe["data"]["seq_len"]
    last: dict[str, float] = {}
    if (source.folder.parent / "metrics.jsonl").is_file():
        for line in log.read_metrics(source.folder.parent):
            if line["step"] <= manifest["step"]:
                last |= line
    mean = " These weights are the running mean of the trained ones (EMA)." if source.weights == "ema" else ""
    names = [name for name in last if name == "loss" or name.startswith(("loss/", *log.VALIDATED))]
    rows = [f"| {name} | {last[name]:.4f} |" for name in names if last[name] is not None]
    losses = "\n".join(["| loss | nats per token |", "|---|---|", *rows]) if rows else "No losses were recorded."
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {title}

A {architecture} of {num_params:,} parameters, after {manifest["step"]:,} steps of training on {tokens:,} tokens.{mean}
Made with Modalities {__version__}.

{losses}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
```

## Recipe

```json
{json.dumps(recipe, indent=2)}
```
"""


def check(folder: Path, source: Found, digests: dict[str, str], dtype: Dtype) -> str:
    """Read a folder back and compare it with the checkpoint; what was compared, or ValueError for what differs."""
    config = families.read_config(folder)
    found = {}
    for name, param in families.read_weights(folder, config):
        rows = config.vocab_size if name in families.PADDED else len(param)
        found[name] = digest(param[:rows].to(getattr(torch, dtype)))
    different = [name for name in digests.keys() | found.keys() if digests.get(name) != found.get(name)]
    if different:
        raise ValueError(f"{folder}: {min(different)} is not what was written; is the disk full or damaged?")
    text = f"all {len(found)} parameters are there once, and equal to the checkpoint's to the bit"
    text += "" if dtype == "float32" else f" once rounded to {dtype}"
    text += ", µP's multiples folded into them" if source.config.mup_base_width else ""
    shapes = shapes_of(config)

    def read(names: set[str]) -> Params:
        return checkpoint.load_params(
            source.folder, {name: torch.empty(shapes[name]) for name in names}, source.weights
        )

    def read_back(names: set[str]) -> Params:
        return {name: weight for name, weight in families.read_weights(folder, config, names) if name in names}

    ours, theirs = some_logits(source.config, read), some_logits(config, read_back)
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    if not difference <= LOGITS_BOUND[dtype]:  # nor if it is not a number
        raise ValueError(f"{folder}: its logits differ from the checkpoint's by {difference:.1e} of the largest")
    return f"{text}; logits differ by at most {difference:.1e} of the largest"


def shapes_of(config: ModelConfig) -> dict[str, torch.Size]:
    return {name: param.shape for name, param in build_skeleton(config).named_parameters()}


def recipe_of(source: Found) -> dict[str, Any]:
    assert source.recipe is not None
    return source.recipe


@torch.no_grad()
def some_logits(config: ModelConfig, read: Callable[[set[str]], Params]) -> Tensor:
    """Logits [2, T, vocab_size] of up to 16 tokens, the same whenever it is called.

    `read` gives the parameters of those names; a layer's are in memory only while it computes.
    """
    model = build_skeleton(config)

    def fill(names: set[str], module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for name, weight in read(names).items():
            setattr(module, name.rpartition(".")[2], nn.Parameter(weight, requires_grad=False))

    def empty(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        module.to("meta")

    for prefix, module in model.named_modules():
        if names := {f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)}:
            module.register_forward_pre_hook(functools.partial(fill, names))
            module.register_forward_hook(empty)

    def head(hidden_BTD: Tensor, empty_VD: Tensor) -> Tensor:
        """The model's own, which is no layer that a hook could fill."""
        name = "embed.weight" if config.tied else "head.weight"
        return model.logits(hidden_BTD, read({name})[name])

    shape = 2, min(16, config.max_seq_len)
    tokens_BT = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return model(tokens_BT, head=head)


# --------------------------------------------------------------------------------------------------------------- import


def import_folder(folder: Path, /, out: Path) -> None:
    """Make a Hugging Face folder a run with one checkpoint, of step 0, to generate from and to train on.

    Args:
        folder: What transformers' save_pretrained wrote: config.json, safetensors, tokenizer.json.
        out: The run's folder to be made.
    """
    refuse_out(out)
    source = trained.find_hugging_face(folder)
    config = source.config
    if source.tokenizer is not None:
        trained.load_tokenizer(source.tokenizer, config.vocab_size)  # which a model of fewer tokens refuses
    adopt(dict(families.read_weights(folder, config)), source, out)
    print(f"{out}: {num_params(config):,} parameters from {folder}, as the checkpoint step-00000000")
    if source.tokenizer is None:
        print(f"{folder} has no tokenizer.json, so the run has no tokenizer: it takes tokens, and generates no text")
    elif source.eod is None:
        print(f"{folder} names no token that ends texts (eos_token), so data.eod is empty")


# ---------------------------------------------------------------------------------------------------------------- files


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_bytes(as_json(value))


def main(args: list[str]) -> None:
    commands: dict[str, Callable[..., None]] = {"export": export, "import": import_folder, "average": average}
    cli.call_subcommand(commands, args, "python -m modalities.hf", "Hugging Face folders, both ways; means of models.")


if __name__ == "__main__":
    cli.run(main)
