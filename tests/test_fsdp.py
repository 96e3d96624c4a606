"""FSDP2 on real ranks (gloo): weights, gradients and losses are those of one process; names stay clean."""

from dataclasses import replace

import pytest
import tiny
import torch
from test_step import assert_grads_equal, reference_grads
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from modalities import dist, fsdp, step
from modalities.fsdp import ParallelConfig
from modalities.loss import Batch
from modalities.model import ModelConfig, Transformer, build_skeleton
from modalities.optim import Params

# Five rows of a 3-rank shard do not divide evenly: an odd width and head count show padding errors.
ODD = ModelConfig(vocab_size=100, num_layers=3, width=30, num_heads=3, head_dim=10, mlp_width=35, max_seq_len=64)


def sharded_model(config: ModelConfig, world: dist.World, parallel: ParallelConfig) -> tuple[Transformer, Params]:
    model = build_skeleton(config)
    fsdp.parallelize(model, world.mesh, parallel)
    return model, fsdp.init_params(model, 0, world.device)


def whole(params: Params) -> Params:
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in params.items()}


def shard_of(batch: Batch, world: dist.World) -> Batch:
    """A rank's sequences, as two micro-batches of the same size."""
    return {key: value.chunk(world.size)[world.rank].unflatten(0, (2, -1)) for key, value in batch.items()}


def sharded_grads(config: ModelConfig, parallel: ParallelConfig, batch: Batch, world: dist.World) -> Params:
    model, params = sharded_model(config, world, parallel)
    loss_fn = step.make_loss_fn(model, parallel.compute_dtype, train=True)
    grad_fn = step.grad_and_value(loss_fn, sharded=True, compile=parallel.compile)
    grads, _ = step.accumulated_grads(grad_fn, params, shard_of(batch, world))
    assert grads.keys() == dict(build_skeleton(config).named_parameters()).keys()
    return whole(grads)


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
        fp32 = ParallelConfig(param_dtype="float32", compile=False)
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
        sharded = sharded_grads(config, ParallelConfig(compile=False), batch, world)
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
def test_blocks_are_compiled_once_for_all_layers() -> None:
    tiny.run_ranks(2, compiled_once, replace(tiny.MODEL, num_layers=12))
