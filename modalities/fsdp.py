"""How a model is spread over ranks and memory: split tensors → recompute → compile → `fully_shard`.

The only place that does it; what can be split, and what is gathered together, the model says.
"""

import re
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from modalities.compiling import can_compile, compiled
from modalities.model import TENSOR_PLAN, Block, ModelConfig, Transformer, initial_weight
from modalities.optim import Params, local
from modalities.rng import fold

WITHOUT_CUDA_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is cut and in which precision it is done."""

    micro_batch: int | Literal["auto"] = 8
    """Sequences that a rank puts through the model at once; the rest of the global batch is accumulated."""
    shard: int = -1
    """Ranks that share one copy of weights, gradients and optimizer state; -1: the rest of the ranks."""
    replicate: int = 1
    """Copies of the sharded model (HSDP): gradients are summed over them, weights are gathered within one."""
    tensor: int = 1
    """Ranks that share each matrix product and each sequence (tensor and sequence parallelism)."""
    reshard_after_forward: bool | int = True
    """Free gathered weights after the forward pass and gather them again; an int: keep shards for so many ranks."""
    blocks_per_unit: int = 1
    """Blocks that are gathered together."""
    prefetch: int = 0
    """Units gathered ahead of the one that computes; 0: as FSDP2 does by itself."""
    param_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of weights and activations in the forward and backward pass; the master weights stay in fp32."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which gradients are summed over ranks."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in the host's memory (GPUs alone)."""
    activation_checkpointing: Literal["none", "full", "every_k", "selective"] = "none"
    """Blocks compute their activations anew in the backward pass: all, each k-th, or all but products and attention."""
    checkpoint_every: int = 2
    """every_k: the k."""
    sync_gradients: Literal["every", "last"] = "every"
    """every: gradients are summed over ranks at each micro-batch, and only one unit's are ever whole; last: at a step's
    last, which sends less, but until then each rank keeps all of them whole, 4 bytes a parameter."""
    compile: Literal["off", "block", "model"] = "model"
    """torch.compile: nothing, each block, or the whole gradient function, where the model is sharded each block."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """How hard torch.compile tries. CUDA graphs (reduce-overhead, max-autotune) are for a whole model in one process;
    blocks are compiled without them, for FSDP2 puts weights elsewhere each time."""

    def __post_init__(self) -> None:
        for name in ("micro_batch", "replicate", "tensor", "blocks_per_unit", "checkpoint_every"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ValueError(f"parallel.{name} is {value}, but must be at least 1")
        if self.shard < 1 and self.shard != -1:
            raise ValueError(f"parallel.shard is {self.shard}, but must be at least 1, or -1 for the rest of the ranks")
        if not isinstance(self.reshard_after_forward, bool) and self.reshard_after_forward < 2:
            raise ValueError(
                f"parallel.reshard_after_forward is {self.reshard_after_forward}, but must be true, false or at least 2"
            )
        if self.prefetch < 0:
            raise ValueError(f"parallel.prefetch is {self.prefetch}, but must not be negative")

    @property
    def compute_dtype(self) -> torch.dtype:
        return getattr(torch, self.param_dtype)

    def compiles_blocks(self, sharded: bool) -> bool:
        """Whether each block is compiled by itself, and what is around them not."""
        return self.compile == "block" or (self.compile == "model" and sharded)

    def compiles_whole(self, sharded: bool) -> bool:
        """Whether the whole gradient function is one program."""
        return self.compile == "model" and not sharded

    def differentiates_by_autograd(self, sharded: bool) -> bool:
        """Whether gradients are autograd's and not torch.func's.

        torch.func knows no recomputation, and what is not compiled it takes twice the time and memory for: it keeps all
        that a second derivative would need.
        """
        return not self.compiles_whole(sharded) or self.activation_checkpointing != "none"

    def recomputes(self, layer: int) -> bool:
        """Whether the block `layer` computes its activations anew in the backward pass."""
        if self.activation_checkpointing == "every_k":
            return layer % self.checkpoint_every == 0
        return self.activation_checkpointing != "none"


def without_missing_compiler(config: ParallelConfig, device: torch.device) -> ParallelConfig:
    """`config`, but without compilation on a CPU that has no C++ compiler: a bare machine trains too, only slower."""
    return config if can_compile(device) else replace(config, compile="off")


def check_split(config: ModelConfig, tensor: int) -> None:
    """Raise ValueError if a model cannot be split among `tensor` ranks."""
    sizes = {
        "num_heads": config.num_heads,
        "num_kv_heads": config.kv_heads,
        "mlp_width": config.mlp_hidden,
        "padded_vocab_size": config.padded_vocab_size,
    }
    for name, size in sizes.items():
        if size % tensor:
            raise ValueError(f"model.{name} {size} is not divisible by parallel.tensor {tensor}; change one of them")
    if config.vocab_size <= config.padded_vocab_size // tensor * (tensor - 1):
        raise ValueError(f"model.vocab_size {config.vocab_size} is too small for parallel.tensor {tensor}; lower it")


def parallelize(model: Transformer, mesh: DeviceMesh | None, config: ParallelConfig) -> None:
    """Change `model` (still on the meta device) in place: split tensors → recompute → compile → `fully_shard`.

    Without a mesh, in one process, it stays a skeleton for plain tensors. The names of parameters stay in any case.
    """
    if config.cpu_offload and (mesh is None or mesh.device_type == "cpu"):
        raise ValueError("parallel.cpu_offload is for several ranks on GPUs, which this run has not; leave it off")
    if mesh is not None and "tensor" in (mesh.mesh_dim_names or ()):
        check_split(model.config, mesh["tensor"].size())
        split(model, mesh["tensor"])
    change_blocks(model, config, sharded=mesh is not None)
    if mesh is not None:
        shard(model, mesh, config)


# ------------------------------------------------------------------------------------------------- splitting of tensors


def split(model: Transformer, mesh: DeviceMesh) -> None:
    """Tensor and sequence parallelism (Korthikanti et al., arXiv 2205.05198) after the model's plan.

    A rank has some heads, hidden features and words, and between blocks some positions of every sequence. What enters a
    block is gathered for all of its products at once, and what leaves it is summed and cut in one exchange.
    """
    for name, module in model.named_modules():
        for pattern, how in TENSOR_PLAN:
            if re.fullmatch(pattern, name):
                split_module(module, how, mesh)


def split_module(module: nn.Module, how: str, mesh: DeviceMesh) -> None:
    """Give a module its part of the weights, and its inputs and outputs the layout that the word `how` stands for."""
    positions = Shard(1)
    styles: list[ParallelStyle]
    if how == "words":  # looked up where they are, summed to the rank's positions
        styles = [RowwiseParallel(input_layouts=Replicate(), output_layouts=positions)]
    elif how == "columns":
        styles = [ColwiseParallel()]
    elif how == "rows":
        styles = [RowwiseParallel(output_layouts=positions)]
    elif how == "heads":  # a whole weight, and the rank's own heads
        styles = [SequenceParallel(sequence_dim=2, use_local_output=True)]
    elif how == "sequence":  # a whole weight, and the rank's own positions, which all ranks then get
        gathered = PrepareModuleOutput(
            output_layouts=positions, desired_output_layouts=Replicate(), use_local_output=False
        )
        styles = [SequenceParallel(), gathered]
    else:
        assert how == "table"  # a whole weight, and all positions, of which the rank then takes its own
        distribute_module(module, mesh)
        everywhere = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate())
        styles = [everywhere, PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=positions)]
    for style in styles:
        parallelize_module(module, mesh, style)
    if how == "words":
        # It may still be on its way, and compiled code gives such an input no gradient; a copy waits for it.
        module.register_forward_hook(lambda module, inputs, out: out.clone())


# ------------------------------------------------------------------------------------------- activation checkpointing

KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
]
"""What `selective` does not compute anew: it costs more than the rest together."""


class _Pure(nn.Module):
    """A block's own forward as a function of its weights, for `functional_call`."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any) -> Tensor:
        return Block.forward(self.block, *args)


def recomputing(block_forward: Callable[..., Tensor], selective: bool, sharded: bool) -> Callable[..., Tensor]:
    """A block's forward, but what it computes is forgotten until the backward pass, and then computed anew."""
    again = partial(checkpoint, use_reentrant=False)
    if selective:
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, KEPT))

    def forward(block: Block, *args: Any) -> Tensor:
        if sharded or torch.compiler.is_compiling():
            return again(block_forward, block, *args)
        # A skeleton has its weights only as long as the forward pass lasts: so they are arguments here, and kept.
        pure = _Pure(block)
        return again(partial(functional_call, pure), dict(pure.named_parameters()), args)

    return forward


def change_blocks(model: Transformer, config: ParallelConfig, sharded: bool) -> None:
    """Let blocks recompute and be compiled: the method and not the module, so that names of parameters stay."""
    selective = config.activation_checkpointing == "selective"
    plain: Callable[..., Tensor] = Block.forward
    anew = recomputing(plain, selective, sharded)
    if config.compiles_blocks(sharded):
        # Once for all blocks.
        mode = WITHOUT_CUDA_GRAPHS.get(config.compile_mode, config.compile_mode)
        plain, anew = compiled(plain, mode), compiled(anew, mode)
        if is_split(model) and not selective:
            # PyTorch 2.13 fails to compile a forgetful block of DTensors, so the compiled block is run again.
            anew = recomputing(plain, selective, sharded)
    if selective and config.compiles_whole(sharded):
        return  # the compiler does it, and better: what it fuses costs little
    for layer, block in enumerate(model.blocks):
        forward = anew if config.recomputes(layer) else plain
        if forward is not Block.forward:
            block.forward = types.MethodType(forward, block)


# ------------------------------------------------------------------------------------------------------------ sharding


def shard(model: Transformer, mesh: DeviceMesh, config: ParallelConfig) -> None:
    """FSDP2: units of blocks and then the rest; on a mesh with "replicate" HSDP, which sums over the copies as well."""
    names = tuple(name for name in ("replicate", "shard") if name in (mesh.mesh_dim_names or ()))
    fully = partial(
        fully_shard,
        mesh=mesh[names],
        mp_policy=MixedPrecisionPolicy(
            param_dtype=config.compute_dtype,
            reduce_dtype=getattr(torch, config.reduce_dtype),
            # The weights alone decide the dtype: RoPE's angles, which blocks are given, must stay in fp32.
            cast_forward_inputs=False,
        ),
        offload_policy=CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy(),
    )
    blocks, size = model.sharding_units(), config.blocks_per_unit
    units = [blocks[first : first + size] for first in range(0, len(blocks), size)]
    for unit in units:
        fully(unit, reshard_after_forward=config.reshard_after_forward)
    # Not said of the root, which FSDP2 keeps gathered: the backward pass begins with it.
    fully(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the global number of targets, so gradients are summed over ranks.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if config.prefetch:
        prefetch(model, [unit[0] for unit in units], config.prefetch)


def prefetch(model: Transformer, units: list[Any], ahead: int) -> None:
    """Gather the weights of `ahead` units before the one that computes is done: more overlap, for their memory."""
    assert isinstance(model, FSDPModule)
    model.set_modules_to_forward_prefetch(units[:ahead])
    model.set_modules_to_backward_prefetch(units[::-1][:ahead])
    for i, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[i + 1 : i + 1 + ahead])
        unit.set_modules_to_backward_prefetch(units[:i][::-1][:ahead])


def sync_gradients(model: Transformer, on: bool) -> None:
    """Whether the next backward pass sums gradients over ranks, or keeps them whole on each, 4 bytes a parameter."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)


# ------------------------------------------------------------------------------------------------------------- weights


def init_params(model: Transformer, seed: int, device: torch.device, offloaded: bool = False) -> Params:
    """The initial weights on `device`: the model's own shards (on the CPU if `offloaded`), else plain tensors.

    Each weight is drawn whole from a seed folded with its name, and a rank keeps its part, so that the weights depend
    neither on the number of ranks nor on the order of the modules. One tensor at a time exists in full.
    """
    if isinstance(model, FSDPModule):
        model.to_empty(device="cpu" if offloaded else device)
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


def is_split(model: Transformer) -> bool:
    """Whether `model` is tensor-parallel, so that its forward pass is for `parallel.tensor` ranks together."""
    return any("tensor" in (p.device_mesh.mesh_dim_names or ()) for p in model.parameters() if isinstance(p, DTensor))


def whole(param: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded, on every rank; all ranks together."""
    return param.full_tensor() if isinstance(param, DTensor) else param


@torch.no_grad()
def assign(param: Tensor, weight: Tensor) -> None:
    """Give `param` the values of the whole `weight`, which all ranks have: where it is a shard, its part of them."""
    if isinstance(param, DTensor):
        weight = weight.to(param.device_mesh.device_type)
        weight = local(distribute_tensor(weight, param.device_mesh, param.placements, src_data_rank=None))
    local(param).copy_(weight)
