"""FSDP2 on real ranks (gloo): weights, gradients and losses are those of one process; names stay clean."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_step import GPT2, assert_grads_equal, initial, reference_grads, with_count
from torch import Tensor
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modalities import dist, fsdp, generate, step
from modalities.fsdp import ParallelConfig
from modalities.loss import NLL, Batch, LossConfig
from modalities.model import ModelConfig, Transformer, build_skeleton
from modalities.optim import Params, global_norm
from modalities.recipe import check_ranks

# Five rows of a 3-rank shard do not divide evenly: an odd width and head count show padding errors.
ODD = ModelConfig(vocab_size=100, num_layers=3, width=30, num_heads=3, head_dim=10, mlp_width=35, max_seq_len=64)


def sharded_model(config: ModelConfig, world: dist.World, parallel: ParallelConfig) -> tuple[Transformer, Params]:
    model = build_skeleton(config)
    fsdp.parallelize(model, world.mesh, parallel)
    return model, fsdp.init_params(model, 0, world.device)


def whole(params: Params) -> Params:
    return {name: fsdp.whole(param) for name, param in params.items()}


def shard_of(batch: Batch, world: dist.World) -> Batch:
    """A rank's sequences, as two micro-batches of the same size."""
    return {key: value.chunk(world.data_size)[world.data_rank].unflatten(0, (2, -1)) for key, value in batch.items()}


def sharded_grads(
    config: ModelConfig, parallel: ParallelConfig, batch: Batch, world: dist.World, loss: LossConfig = NLL
) -> Params:
    model, params = sharded_model(config, world, parallel)
    sources = 1 + int(batch["sources"].max()) if "sources" in batch else 1
    loss_fn = step.make_loss_fn(model, parallel.compute_dtype, train=True, num_sources=sources, loss=loss)
    grad_fn = step.grad_and_value(loss_fn, sharded=True, compile=False)
    sync = functools.partial(fsdp.sync_gradients, model) if parallel.sync_gradients == "last" else None
    grads, _ = step.accumulated_grads(grad_fn, params, shard_of(batch, world), world.data_group, sync)
    assert list(grads) == [name for name, _ in build_skeleton(config).named_parameters()]
    norm, gathered = global_norm(grads.values()), whole(grads)
    torch.testing.assert_close(norm, global_norm(gathered.values()), rtol=1e-6, atol=0)
    return gathered


def plain_grads(
    config: ModelConfig, batch: Batch, loss: LossConfig = NLL, dtype: torch.dtype = torch.float64
) -> Params:
    """Those of one process, eager."""
    sources = 1 + int(batch["sources"].max()) if "sources" in batch else 1
    loss_fn = step.make_loss_fn(build_skeleton(config), dtype, train=True, num_sources=sources, loss=loss)
    params = {name: param.to(dtype) for name, param in initial(config).items()}
    grad_fn = step.grad_and_value(loss_fn, sharded=False, compile=False)
    return grad_fn(params, with_count(batch))[0]


def same_initial_weights(config: ModelConfig) -> None:
    with dist.setup() as world:
        params = whole(sharded_model(config, world, ParallelConfig())[1])
    plain = fsdp.init_params(build_skeleton(config), 0, world.device)
    assert params.keys() == plain.keys()
    assert all(torch.equal(params[name], plain[name]) and plain[name].dtype == torch.float32 for name in plain)


@pytest.mark.parametrize("ranks", [2, 3])
def test_initial_weights_do_not_depend_on_ranks(ranks: int) -> None:
    tiny.run_ranks(ranks, same_initial_weights, ODD)


def same_gradients(config: ModelConfig) -> None:
    batch = tiny.batch(config, (8, 32), ignored=0.4)
    batch["targets"][:3] = -100  # so that ranks have different numbers of targets
    expected = reference_grads(config, batch)
    with dist.setup() as world:
        fp32 = ParallelConfig(param_dtype="float32", compile="off")
        assert_grads_equal(sharded_grads(config, fp32, batch, world), expected, 1e-5)
        bf16 = sharded_grads(config, replace(fp32, param_dtype="bfloat16"), batch, world)
        assert all(grad.dtype == torch.float32 for grad in bf16.values())
        assert_grads_equal(bf16, expected, 5e-2)


def test_sharded_gradients_equal_float64() -> None:
    tiny.run_ranks(2, same_gradients, tiny.MODEL)


def same_precision_both_ways(config: ModelConfig) -> None:
    """FSDP2's policy and the cast in the function give the same bf16 numbers, up to a rounding (2^-8).

    They are not equal to the bit: under torch.func, PyTorch takes SiLU's twice differentiable derivative, which rounds
    between its operations.
    """
    batch = tiny.batch(config, (8, 32))
    with dist.setup() as world:
        sharded = sharded_grads(config, ParallelConfig(compile="off"), batch, world)
    loss_fn = step.make_loss_fn(build_skeleton(config), torch.bfloat16, train=True)
    cut = {key: value.unflatten(0, (4, -1)) for key, value in batch.items()}
    params = fsdp.init_params(build_skeleton(config), 0, world.device)
    plain, _ = step.accumulated_grads(step.grad_and_value(loss_fn, sharded=False, compile=False), params, cut)
    assert_grads_equal(sharded, plain, 1e-2)


def test_mixed_precision_is_the_same_sharded_and_plain() -> None:
    tiny.run_ranks(2, same_precision_both_ways, tiny.MODEL)


def compiled_once(config: ModelConfig) -> None:
    batch = tiny.batch(config, (8, 32))
    with dist.setup() as world:
        grads = sharded_grads(config, ParallelConfig(param_dtype="float32"), batch, world)
    assert_grads_equal(grads, reference_grads(config, batch), 1e-5)
    # One graph serves all blocks and micro-batches: the number of graphs must not grow with depth.
    assert counters["stats"]["unique_graphs"] == 1, counters["stats"]


@tiny.needs_compiler
@pytest.mark.slow
def test_blocks_are_compiled_once_for_all_layers() -> None:
    tiny.run_ranks(2, compiled_once, replace(tiny.MODEL, num_layers=12))


OPTIONS: list[dict[str, Any]] = [
    {"blocks_per_unit": 2, "prefetch": 1},
    {"reshard_after_forward": False, "activation_checkpointing": "full"},
    {"sync_gradients": "last", "activation_checkpointing": "every_k"},
]


def same_with_options() -> None:
    batch = tiny.batch(ODD, (8, 32), ignored=0.4)
    expected = reference_grads(ODD, batch)
    with dist.setup() as world:
        for options in OPTIONS:
            parallel = ParallelConfig(param_dtype="float32", compile="off", **options)
            assert_grads_equal(sharded_grads(ODD, parallel, batch, world), expected, 1e-5)


def test_units_prefetch_and_synchronisation_change_no_gradient() -> None:
    tiny.run_ranks(2, same_with_options)


# ------------------------------------------------------------------------------------------------------ tensor parallel

SPLIT = {
    "tied": tiny.MODEL,
    "biases, a table of positions, a head": GPT2,
    "norms of heads, a window, a softcap": replace(
        tiny.MODEL, qk_norm=True, window=8, logit_softcap=5.0, norm="layernorm"
    ),
    "a table alone": replace(tiny.MODEL, positions="learned", qkv_bias=True, activation="gelu"),
}
LOSSES = [LossConfig(implementation="plain"), LossConfig(implementation="chunked", chunk_tokens=10)]


def same_when_split() -> None:
    """Gradients and texts of a tensor-parallel model; the last of its two ranks has fewer words than rows."""
    with dist.setup(tensor=2) as world:
        fp32 = ParallelConfig(param_dtype="float32", compile="off")
        for config in SPLIT.values():
            batch = tiny.packed_batch(config, (8, 32), num_sources=3)
            for loss in LOSSES:
                loss = replace(loss, z_loss=1e-2, label_smoothing=0.1)
                found = sharded_grads(config, fp32, batch, world, loss)
                assert_grads_equal(found, plain_grads(config, batch, loss), 1e-5)
        bf16 = replace(fp32, param_dtype="bfloat16")
        assert_grads_equal(sharded_grads(GPT2, bf16, batch, world), plain_grads(GPT2, batch), 5e-2)
        model, params = sharded_model(GPT2, world, fp32)
        assert all(torch.equal(fsdp.whole(params[name]), want) for name, want in initial(GPT2).items())
        texts = []
        for own in ((model, params), (build_skeleton(GPT2), initial(GPT2))):
            decoder = generate.make_decoder(*own, torch.float32, world.device)
            texts.append(decoder.next_logits(torch.tensor([[5, 4, 3]])))
        torch.testing.assert_close(*texts, rtol=0, atol=0)


def test_a_model_split_among_ranks_has_the_same_gradients() -> None:
    tiny.run_ranks(2, same_when_split)


@pytest.mark.parametrize(
    "tensor, changes, field",
    [
        (3, {}, "num_heads 4"),
        (4, {}, "num_kv_heads 2"),
        (2, {"mlp_width": 35}, "mlp_width 35"),
        (2, {"vocab_size": 64}, "vocab_size 64"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(tensor: int, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=f"^model.{field} [^\n]*parallel.tensor {tensor}; [^\n]*$"):
        fsdp.check_split(replace(tiny.MODEL, **changes), tensor)


@pytest.mark.parametrize(
    "ranks, parallel, message",
    [
        (4, ParallelConfig(tensor=2, micro_batch=3), "data.global_batch 8"),
        (6, ParallelConfig(tensor=3, micro_batch=1), "model.num_heads 4"),
        (2, ParallelConfig(shard=4, micro_batch=1), "parallel.replicate 1"),
        (4, ParallelConfig(reshard_after_forward=3, micro_batch=1), "parallel.reshard_after_forward 3"),
    ],
)
def test_what_does_not_fit_the_ranks_is_refused(
    tmp_path: Path, ranks: int, parallel: ParallelConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message} [^\\n]*; change [^\\n]*$"):
        check_ranks(tiny.recipe(tmp_path, parallel=parallel), ranks)


def test_what_one_process_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="^parallel.cpu_offload [^\\n]*$"):
        fsdp.parallelize(build_skeleton(tiny.MODEL), None, ParallelConfig(cpu_offload=True))
    with pytest.raises(ValueError, match="^parallel.reshard_after_forward is 1, "):
        ParallelConfig(reshard_after_forward=1)


# --------------------------------------------------------------------------------------------- activation checkpointing

MODES = ("full", "every_k", "selective")
DEEP = replace(tiny.MODEL, num_layers=4)


def recomputing_grad_fn(config: ModelConfig, mode: Any, compile: Any, dtype: torch.dtype) -> step.GradFn:
    """Of one process."""
    parallel, model = ParallelConfig(activation_checkpointing=mode, compile=compile), build_skeleton(config)
    fsdp.parallelize(model, None, parallel)
    loss_fn = step.make_loss_fn(model, dtype, train=True)
    return step.grad_and_value(loss_fn, sharded=False, compile=compile == "model", by_autograd=True)


@pytest.mark.parametrize("config", [DEEP, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "compile",
    [
        "off",
        pytest.param("block", marks=tiny.needs_compiler),
        pytest.param("model", marks=[tiny.needs_compiler, pytest.mark.slow]),
    ],
)
def test_one_process_recomputes_the_same_gradients(config: ModelConfig, mode: str, compile: str) -> None:
    batch = tiny.batch(config, (4, 33), ignored=0.3)
    grads, _ = recomputing_grad_fn(config, mode, compile, torch.float32)(initial(config), with_count(batch))
    assert_grads_equal(grads, reference_grads(config, batch), 1e-5)


class Alive(TorchDispatchMode):
    """The memory that operators returned and that is still in use [bytes]."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.sizes[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return out

    def bytes(self) -> int:
        return sum(size for storage, size in self.sizes.items() if not storage.expired())


def kept_for_backward(mode: Any) -> int:
    """What an eager forward pass of one process leaves [bytes]."""
    model = build_skeleton(DEEP)
    fsdp.parallelize(model, None, ParallelConfig(activation_checkpointing=mode, compile="off"))
    params = {name: param.requires_grad_() for name, param in initial(DEEP).items()}
    batch = with_count(tiny.batch(DEEP, (4, 32)))
    with Alive() as alive:
        loss, _ = step.make_loss_fn(model, torch.float32, train=True)(params, batch)
        kept = alive.bytes()
    assert loss.requires_grad
    return kept


def test_recomputing_saves_memory() -> None:
    kept = {mode: kept_for_backward(mode) for mode in ("none", *MODES)}
    print(kept)
    assert kept["full"] < kept["selective"] < kept["none"] and kept["full"] < kept["every_k"] < kept["none"]
    # Half of the blocks keep all that they did, the others little.
    assert kept["every_k"] < 0.65 * kept["none"] and kept["full"] < 0.3 * kept["none"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compile", ["off", pytest.param("model", marks=[tiny.needs_compiler, pytest.mark.slow])])
def test_dropout_is_the_same_when_recomputed(mode: str, compile: str) -> None:
    """Along the gradient the loss grows by its squared norm, which other masks in the backward pass would spoil."""
    config = replace(tiny.MODEL, resid_dropout=0.3, attn_dropout=0.2, embed_dropout=0.1)
    grad_fn, params = recomputing_grad_fn(config, mode, compile, torch.float64), initial(config, torch.float64)
    batch = with_count(tiny.batch(config, (4, 32)))

    def at(shift: float, grads: Params) -> tuple[Params, float]:
        torch.manual_seed(0)
        found, (loss, _) = grad_fn({name: p + shift * grads[name] for name, p in params.items()}, batch)
        return found, float(loss)

    grads, _ = at(0.0, params)
    slope = (at(1e-5, grads)[1] - at(-1e-5, grads)[1]) / 2e-5
    assert slope == pytest.approx(float(global_norm(grads.values()).square()), rel=1e-6)
