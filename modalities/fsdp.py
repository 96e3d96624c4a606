"""How a model is compiled and spread over ranks: compile each block → `fully_shard`. The only place that does it."""

import types
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from modalities.compiling import can_compile, compiled
from modalities.model import Block, Transformer, initial_weight
from modalities.optim import Params, local
from modalities.rng import fold


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is cut and in which precision it is done."""

    micro_batch: int = 8
    """Sequences that a rank puts through the model at once; the rest of the global batch is accumulated."""
    param_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of weights and activations in the forward and backward pass; the master weights stay in fp32."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which gradients are summed over ranks."""
    compile: bool = True
    """torch.compile: the whole gradient function on one device, each block when sharded."""

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise ValueError(f"parallel.micro_batch is {self.micro_batch}, but must be at least 1")

    @property
    def compute_dtype(self) -> torch.dtype:
        return getattr(torch, self.param_dtype)


def without_missing_compiler(config: ParallelConfig, device: torch.device) -> ParallelConfig:
    """`config`, but without compilation on a CPU that has no C++ compiler: a bare machine trains too, only slower."""
    return config if can_compile(device) else replace(config, compile=False)


def parallelize(model: Transformer, mesh: DeviceMesh | None, config: ParallelConfig) -> None:
    """Compile and shard `model` (still on the meta device) in place, each of its units and then the rest.

    Without a mesh there is nothing to do: one process works on plain tensors and compiles its step as a whole.
    """
    if mesh is None:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=config.compute_dtype,
        reduce_dtype=getattr(torch, config.reduce_dtype),
        # The weights alone decide the dtype: RoPE's angles, which blocks are given, must stay in fp32.
        cast_forward_inputs=False,
    )
    block_forward = compiled(Block.forward)
    for unit in model.sharding_units():
        if config.compile:
            # The method and not the module, so that FSDP2's hooks stay outside and parameter names stay clean.
            unit.forward = types.MethodType(block_forward, unit)
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the global number of targets, so gradients are summed over ranks.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def init_params(model: Transformer, seed: int, device: torch.device) -> Params:
    """The initial weights on `device`: the model's own shards if it is sharded, else plain tensors.

    Each weight is drawn whole from a seed folded with its name, and a rank keeps its part, so that the weights depend
    neither on the number of ranks nor on the order of the modules. One tensor at a time exists in full.
    """
    if isinstance(model, FSDPModule):
        model.to_empty(device=device)
    params: Params = {}
    for name, param in model.named_parameters():
        generator = torch.Generator(device).manual_seed(fold(seed, "init", name))
        weight = initial_weight(model.config, name, param.shape, generator)
        if isinstance(param, DTensor):
            assign(param, weight)
            params[name] = param
        else:
            params[name] = weight
    return params


@torch.no_grad()
def assign(param: Tensor, weight: Tensor) -> None:
    """Give `param` the values of the whole `weight`, which all ranks have: where it is a shard, its part of them."""
    weight = weight.to(param.device)
    if isinstance(param, DTensor):
        weight = local(distribute_tensor(weight, param.device_mesh, param.placements, src_data_rank=None))
    local(param).copy_(weight)
