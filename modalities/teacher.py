"""A teacher beside the model that is trained: found, checked against it, loaded, frozen, asked for each micro-batch.

What is learnt from it is in `kl`; here it says what it thinks, as entries of the batch.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from modalities import checkpoint, dist, fsdp, trained
from modalities.compiling import compiled
from modalities.fsdp import WITHOUT_CUDA_GRAPHS, ParallelConfig
from modalities.kl import DistillConfig, distillation
from modalities.loss import Aux, Batch
from modalities.model import ModelConfig, build_skeleton, num_params
from modalities.optim import Params
from modalities.step import GradFn, HeadLoss, apply
from modalities.trained import Found

Teach = Callable[[Batch], Batch]


def find(path: Path) -> Found:
    """The model that `trained.find` would give, but its files are not read: it is hashed when it is loaded."""
    if (path / "config.json").is_file():
        return trained.find_hugging_face(path)
    folders = [path, *checkpoint.steps(path)]
    whole = [folder for folder in folders if (folder / checkpoint.MANIFEST).is_file()]
    return trained.find_checkpoint(whole[0]) if whole else trained.find(path)


def files(config: DistillConfig) -> dict[str, str]:
    """What tells one teacher from another, by its name in the recipe, for `fingerprints`; without one nothing."""
    if config.teacher_topk:
        return {"distill.teacher_topk": config.teacher_topk}
    if not config.teacher:
        return {}
    path = Path(config.teacher)
    folders = [path, *checkpoint.steps(path)]
    names = (checkpoint.MANIFEST, "model.safetensors.index.json", "model.safetensors")
    found = [folder / name for folder in folders for name in names if (folder / name).is_file()]
    return {"distill.teacher": str(found[0] if found else path)}


def check(found: Found, model: ModelConfig, tokenizer: str, seq_len: int) -> None:
    """Raise ValueError if a student of `model`, its data packed with `tokenizer`, cannot learn from `found`."""
    folder, theirs = found.folder, found.config
    if theirs.vocab_size != model.vocab_size:
        raise ValueError(
            f"the teacher {folder} has a vocabulary of {theirs.vocab_size:,}, but model.vocab_size is "
            f"{model.vocab_size:,}; a teacher must have the student's vocabulary"
        )
    his, ours = found.tokenizer, Path(tokenizer)
    if his is not None and his.is_file() and ours.is_file() and not same_words(his, ours, model.vocab_size):
        raise ValueError(
            f"the teacher's tokenizer {his} has other tokens than data.tokenizer {ours}; "
            "a teacher must have the student's vocabulary"
        )
    if theirs.max_seq_len < seq_len:
        raise ValueError(
            f"the teacher {folder} reads {theirs.max_seq_len} tokens, but data.seq_len is {seq_len}; shorten that"
        )


def same_words(one: Path, other: Path, vocab_size: int) -> bool:
    """Whether two `tokenizer.json` give the same numbers to the same tokens; they may be written differently."""
    digests = {hashlib.sha256(path.read_bytes()).digest() for path in (one, other)}
    if len(digests) == 1:
        return True
    words = [trained.load_tokenizer(path, vocab_size).get_vocab(with_added_tokens=True) for path in (one, other)]
    return words[0] == words[1]


def check_recipe(config: DistillConfig, model: ModelConfig, tokenizer: str, seq_len: int, tensor: int) -> None:
    """`check`, for a recipe whose teacher may have to be found, and is not loaded."""
    if config.on and tensor > 1:
        raise ValueError(f"distillation with parallel.tensor {tensor} is not there; set parallel.tensor 1, and shard")
    if config.teacher:
        check(find(Path(config.teacher)), model, tokenizer, seq_len)


def memory_per_rank(
    config: DistillConfig, parallel: ParallelConfig, chunk_tokens: int, tokens: int, shards: int
) -> float:
    """Bytes that a rank has for the teacher when the student's are most, for micro-batches of `tokens` tokens.

    Its weights, what stays gathered of them, its hidden states and the logits of a chunk.
    """
    theirs = find(Path(config.teacher)).config
    root = theirs.padded_vocab_size * theirs.width if shards > 1 else 0
    scratch = chunk_tokens * theirs.vocab_size
    return (num_params(theirs) / shards + root + tokens * theirs.width + scratch) * parallel.compute_dtype.itemsize


def open_teacher(
    config: DistillConfig, parallel: ParallelConfig, world: dist.World
) -> tuple[HeadLoss | None, Teach | None]:
    """(the head's loss of a student, what the teacher adds to each micro-batch); None for what there is not.

    All ranks together. The teacher is in the compute dtype, and under FSDP2 sharded like the student.
    """
    if not config.teacher:
        return (partial(distillation, config, 0.0) if config.on else None), None
    with dist.all_or_none():
        # On one rank, for it hashes the whole checkpoint.
        there = trained.find(find(Path(config.teacher)).folder) if world.is_main else None
    found = dist.broadcast_from_main(there)
    assert found is not None
    loss = partial(distillation, config, found.config.logit_softcap)
    return loss, make_teach(found, parallel, world)


def make_teach(found: Found, parallel: ParallelConfig, world: dist.World) -> Teach:
    """`teach(micro-batch)`: `teacher_hidden` [B, T, E] and `teacher_weight` [V, E], without gradients."""
    dtype, sharded = parallel.compute_dtype, world.mesh is not None
    model = build_skeleton(found.config).to(dtype)
    model.requires_grad_(False)
    fsdp.parallelize(model, world.mesh, replace(parallel, activation_checkpointing="none"))
    if sharded:
        model.to_empty(device="cpu" if parallel.cpu_offload else world.device)
        params: Params = dict(model.named_parameters())
    else:
        named = model.named_parameters()
        params = {name: torch.empty(p.shape, dtype=dtype, device=world.device) for name, p in named}
    trained.load_weights(found, params)

    def hidden_states(params: Params, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs = (batch["inputs"], False, batch.get("positions"), batch.get("documents"))
        if not sharded:
            return apply(model, params, *inputs, head=lambda hidden, weight: (hidden, weight))
        # Not by `apply`, which would take the head's weight away again. It does not change, so it may stay gathered.
        tokens, train, *of_documents = inputs
        return model(tokens, *of_documents, train=train, head=lambda hidden, weight: (hidden, weight))

    forward = hidden_states
    if parallel.compiles_whole(sharded):
        # Without CUDA graphs, in whose memory the student's would come upon the results.
        forward = compiled(hidden_states, WITHOUT_CUDA_GRAPHS.get(parallel.compile_mode, parallel.compile_mode))

    @torch.no_grad()
    def teach(batch: Batch) -> Batch:
        hidden, weight = forward(params, batch)
        return {"teacher_hidden": hidden, "teacher_weight": weight}

    return teach


def taught(grad_fn: GradFn, teach: Teach | None) -> GradFn:
    """`grad_fn`, but the micro-batches that it gets hold what the teacher says of them."""
    if teach is None:
        return grad_fn

    def with_teacher(params: Params, batch: Batch) -> tuple[Params, tuple[Tensor, Aux]]:
        return grad_fn(params, batch | teach(batch))

    return with_teacher
