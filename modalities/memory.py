"""What a rank's memory will hold at its fullest, foretold without using any.

The step's own code runs forward and backward on tensors without memory. Where nothing is compiled, each tensor that it
makes is counted from its birth to its death. Where it is compiled, the step is traced, and only what torch.compile
would keep counts: products, reductions, and what one of these reads or several later ones share; all else is computed
where it is needed. It knows the step, not recipes or data.
"""

import contextlib
import functools
import itertools
import operator
import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modalities import fsdp, step
from modalities.attention import Backend
from modalities.fsdp import ParallelConfig
from modalities.loss import Batch, LossConfig
from modalities.model import ModelConfig, Transformer, build_skeleton, num_params
from modalities.optim import OptimConfig, Params

Parts = dict[str, float]
"""Bytes of parameters, gradients, optimizer, activations and logits."""
TRACED_LAYERS = (4, 6)
"""A model of more blocks is traced with so many, of which each further one adds as much as these did. With fewer memory
may be fullest elsewhere."""


class Event(NamedTuple):
    """A tensor comes into being or, with a negative size, goes."""

    size: int
    key: int
    part: str


def per_rank(
    model: ModelConfig,
    parallel: ParallelConfig,
    loss: LossConfig,
    micro_batch: int,
    seq_len: int,
    accumulated: int,
    shards: int = 1,
    sharded: bool = False,
    device_type: str = "cpu",
    moments: float = 2.0,
) -> Parts:
    """The parts of a rank's memory [bytes] when they are largest together, in training with `moments` a parameter.

    `accumulated`: micro-batches of a step. `shards`: ranks that share the weights by sharding and `parallel.tensor`.
    `sharded`: whether FSDP2 is at work, be it on one shard. Gradients are none where memory is fullest at the end of
    the forward pass. For "selective" in one program this is a guess at the compiler's choice, and may be a sixth low.
    Libraries, compiled code and what an allocator leaves unused between tensors come on top.
    """
    master = 4 * num_params(model) / shards
    fullest = parts_of_model(model, parallel, loss, micro_batch, seq_len, sharded, device_type)
    end = dict.fromkeys(PARTS, 0.0) | {"gradients": master}
    if sharded:
        fullest, end = with_sharded_weights(fullest, model, parallel, master)
    if accumulated > 1:  # those of the micro-batches before, to which these are added
        earlier = master
        if sharded and parallel.sync_gradients == "last":
            earlier = 4 * num_params(model) / parallel.tensor
        fullest["gradients"] += earlier
        end["gradients"] += earlier if sharded else 0
    fullest = max(fullest, end, key=lambda parts: sum(parts.values()))
    kept = 0.0 if parallel.cpu_offload else master
    return {
        "parameters": kept + fullest["weights"],
        "gradients": fullest["gradients"],
        "optimizer": moments * kept,
        "activations": fullest["activations"],
        "logits": fullest["logits"],
    }


def moments_per_parameter(model: ModelConfig, config: OptimConfig) -> float:
    """Two with AdamW; Muon's matrices have one."""
    if config.kind == "adamw":
        return 2.0
    params = build_skeleton(model).named_parameters()
    return 2.0 - sum(p.numel() for name, p in params if re.fullmatch(config.muon.matrices, name)) / num_params(model)


def with_sharded_weights(
    found: Parts, model: ModelConfig, parallel: ParallelConfig, master: float
) -> tuple[Parts, Parts]:
    """PARTS under FSDP2 where the backward pass begins and where it ends, of those `found` without it.

    The root's weights are gathered for the whole step, and those of two units, the one that computes and the next. A
    unit's gradients are whole before they are summed, the root's all the time.
    """
    tensor, compute = parallel.tensor, parallel.compute_dtype.itemsize
    reduced = getattr(torch, parallel.reduce_dtype).itemsize
    block = num_params(replace(model, num_layers=2)) - num_params(replace(model, num_layers=1))
    blocks = model.num_layers * block / tensor
    root, unit = num_params(model) / tensor - blocks, block * parallel.blocks_per_unit / tensor
    units = min(model.num_layers / parallel.blocks_per_unit, 2 + max(0, parallel.prefetch - 1))
    gathered = root + units * unit
    if parallel.reshard_after_forward is False:
        gathered = root + blocks
    elif parallel.reshard_after_forward is not True:
        gathered += blocks / parallel.reshard_after_forward
    begin = {part: found[part] / tensor for part in ("activations", "logits")}
    begin |= {"weights": gathered * compute, "gradients": root * compute + unit * (compute + reduced)}
    end = dict.fromkeys(PARTS, 0.0)
    end |= {"weights": root * compute, "gradients": master + root * (compute + reduced)}
    return begin, end


PARTS = ("weights", "activations", "logits", "gradients")


def largest(events: list[Event]) -> Parts:
    """The PARTS of what is there when it is most; what is left at the end are gradients."""
    left: dict[int, int] = {}
    for event in events:
        left[event.key] = left.get(event.key, 0) + event.size
    now = dict.fromkeys(PARTS, 0.0)
    best, total, most = dict(now), 0, 0
    for event in events:
        now["gradients" if left[event.key] else event.part] += event.size
        total += event.size
        if total > most:
            most, best = total, dict(now)
    return best


def parts_of_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    loss: LossConfig,
    micro_batch: int,
    seq_len: int,
    sharded: bool,
    device_type: str,
) -> Parts:
    """The PARTS of what one micro-batch's gradients need beyond the parameters."""
    of_layers = functools.partial(parts_of_step, model, parallel, loss, micro_batch, seq_len, sharded, device_type)
    few, more = TRACED_LAYERS
    if not is_traced(parallel, sharded) or model.num_layers <= more:
        return of_layers(model.num_layers)
    small, large = of_layers(few), of_layers(more)
    extra = (model.num_layers - few) / (more - few)
    return {part: small[part] + (large[part] - small[part]) * extra for part in PARTS}


def is_traced(parallel: ParallelConfig, sharded: bool) -> bool:
    # PyTorch's `selective` keeps a memory of its own that cannot be traced: uncompiled it would hold a little more.
    by_pytorch = parallel.activation_checkpointing == "selective" and not parallel.compiles_whole(sharded)
    return parallel.compile != "off" and not by_pytorch


def parts_of_step(
    model: ModelConfig,
    parallel: ParallelConfig,
    loss: LossConfig,
    micro_batch: int,
    seq_len: int,
    sharded: bool,
    device_type: str,
    num_layers: int,
) -> Parts:
    """The same if the model has so many blocks."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # flash and flex keep what sdpa keeps, but need a GPU to be called; what auto is depends on the device.
    kept: dict[str, Backend] = {"manual": "manual", "auto": "auto" if device_type == "cpu" else "sdpa"}
    model = replace(model, num_layers=num_layers, attention=kept.get(model.attention, "sdpa"))
    with FakeTensorMode():
        skeleton = build_skeleton(model)
        # FSDP2 casts weights where it gathers them; they are counted by `sharded_weights`.
        dtype = parallel.compute_dtype if sharded else torch.float32
        params = {name: torch.empty(p.shape, dtype=dtype) for name, p in skeleton.named_parameters()}
        inputs, targets = torch.zeros(2, micro_batch, seq_len, dtype=torch.long)
        batch = {"inputs": inputs, "targets": targets, "num_targets": torch.ones(())}
        grad_fn = gradient(skeleton, parallel, loss, sharded)
        part_of = functools.partial(part, params, micro_batch * seq_len * model.vocab_size)
        scratch = loss_scratch(model, parallel, loss, device_type)
        if not is_traced(parallel, sharded):
            return largest(tracked(grad_fn, params, batch, part_of, scratch))
        anew = parallel.activation_checkpointing == "selective"
        return largest(fused(grad_fn, params, batch, part_of, scratch, device_type == "cpu", anew))


def gradient(skeleton: Transformer, parallel: ParallelConfig, loss: LossConfig, sharded: bool) -> step.GradFn:
    """The loop's gradient function of one process, uncompiled."""
    if is_traced(parallel, sharded) and parallel.activation_checkpointing == "selective":
        changed = replace(parallel, activation_checkpointing="none")  # the compiler does it: see `recomputed`
    else:
        changed = parallel
    fsdp.parallelize(skeleton, None, replace(changed, compile="off"))
    loss_fn = step.make_loss_fn(skeleton, parallel.compute_dtype, train=True, loss=loss)
    return step.grad_and_value(loss_fn, False, False, by_autograd=parallel.differentiates_by_autograd(sharded))


def part(params: Params, num_logits: int, tensor: Tensor, is_cast: bool) -> str:
    """Which part `tensor` belongs to; `is_cast`: whether it is a parameter in another dtype."""
    if is_cast:
        return "weights"
    return "logits" if tensor.numel() == num_logits else "activations"


def loss_scratch(model: ModelConfig, parallel: ParallelConfig, loss: LossConfig, device_type: str) -> int:
    """What a chunked loss has for itself [bytes]: the logits of a chunk, and uncompiled on a GPU copies in fp32."""
    copies = 4 * 4 if parallel.compile == "off" and device_type != "cpu" else 0
    return loss.chunk_tokens * model.vocab_size * (parallel.compute_dtype.itemsize + copies)


# --------------------------------------------------------------------------------------------------------- not compiled


class Tracker(TorchDispatchMode):
    """Notes the birth and the death of every tensor's memory, but for that of `known` tensors."""

    def __init__(self, known: Params, part_of: Callable[[Tensor, bool], str], scratch: int) -> None:
        super().__init__()
        self.part_of, self.scratch = part_of, scratch
        self.events: list[Event] = []
        self.keys = itertools.count()
        self.known = {p.untyped_storage()._cdata for p in known.values()}
        self.alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_cast = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.known
        for tensor in tensors(out):
            self.note(tensor, is_cast)
        if func is torch.ops.modalities.linear_cross_entropy.default:
            key = next(self.keys)
            self.events += [Event(self.scratch, key, "logits"), Event(-self.scratch, key, "logits")]
        return out

    def note(self, tensor: Tensor, is_cast: bool) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self.known or place in self.alive:
            return
        born = Event(storage.nbytes(), next(self.keys), self.part_of(tensor, is_cast))
        self.events.append(born)

        def died(_: Any) -> None:
            self.events.append(born._replace(size=-born.size))
            del self.alive[place]

        self.alive[place] = weakref.ref(storage, died)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def tracked(
    grad_fn: step.GradFn, params: Params, batch: Batch, part_of: Callable[[Tensor, bool], str], scratch: int
) -> list[Event]:
    """What `grad_fn`, run as it stands, allocates and frees, in order."""
    with Tracker(params, part_of, scratch) as tracker:
        grads, _ = grad_fn(params, batch)
        events = list(tracker.events)  # before the gradients go
    assert grads
    return events


# ------------------------------------------------------------------------------------------------------------- compiled


class Value(NamedTuple):
    """What is put into memory: the result of a node, as the forward pass computes it or once more for the backward."""

    node: torch.fx.Node
    again: bool = False


class Write(NamedTuple):
    value: Value
    reads: set[Value]


REDUCTIONS = {"sum", "mean", "amax", "amin", "var_mean"}
PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "linear_cross_entropy", "embedding_dense_backward", "index_put",
    "_unsafe_masked_index_put_accumulate", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
}  # fmt: skip
"""Operators that read and write memory; torch.compile makes the rest part of what reads it."""
HEAVY = {"exp", "sigmoid"}
READS_AT_MOST = 4
"""What several need is computed anew for each of them, unless it reads more than this, or on a CPU is heavy: that is
how torch.compile decides (torch/_inductor/ir.py, should_realize_on_reuse)."""


def fused(
    grad_fn: step.GradFn,
    params: Params,
    batch: Batch,
    part_of: Callable[[Tensor, bool], str],
    scratch: int,
    on_cpu: bool,
    anew: bool,
) -> list[Event]:
    """What `grad_fn` would allocate and free, in order, if torch.compile had made one program of it.

    `anew`: a program that in its backward pass computes anew whatever it can fuse.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(grad_fn, decomposition_table=select_decomp_table())(params, batch).graph
    nodes = list(graph.nodes)
    reads = memory_reads(nodes, on_cpu)
    writes = recomputed(nodes, reads) if anew else [Write(Value(n), {Value(r) for r in reads[n]}) for n in reads]
    last_read = {value: i for i, write in enumerate(writes) for value in write.reads}
    dying = defaultdict(list)
    for value, i in last_read.items():
        dying[i].append(value)
    events: list[Event] = []
    born: dict[Value, Event] = {}
    for i, (value, _) in enumerate(writes):
        node = value.node
        dead = [Event(-born[d].size, born[d].key, born[d].part) for d in dying[i]]
        if node.op == "call_function":
            outs = tensors(node.meta["val"])
            is_cast = all(source.op == "placeholder" for source in node.all_input_nodes)
            new = born[value] = Event(sum(out.nbytes for out in outs), i, part_of(outs[0], is_cast))
            # Element by element a result may take the place of what is read for the last time.
            in_place = [e for e in dead if name_of(node) not in PRODUCTS and e.size == -new.size][:1]
            events += [*in_place, new, *(e for e in dead if e not in in_place)]
            if name_of(node) == "linear_cross_entropy":
                events += [Event(scratch, -i - 1, "logits"), Event(-scratch, -i - 1, "logits")]
        else:
            events += dead
    return events


def memory_reads(nodes: list[torch.fx.Node], on_cpu: bool) -> dict[torch.fx.Node, set[torch.fx.Node]]:
    """The nodes whose result is put into memory, and the output: with those whose results they read there."""
    reads: dict[torch.fx.Node, set[torch.fx.Node]] = {}
    heavy: dict[torch.fx.Node, bool] = {}
    kept = set()
    for node in nodes:
        sources = node.all_input_nodes
        reads[node] = set().union(*({s} if s in kept else reads[s] for s in sources))
        heavy[node] = name_of(node) in HEAVY or any(heavy[s] for s in sources if s not in kept)
        if node.op == "output" or name_of(node) in REDUCTIONS | PRODUCTS:
            kept.add(node)
        elif node.op == "call_function" and not is_view(node):
            shared = len(node.users) > 1 and (len(reads[node]) > READS_AT_MOST or (on_cpu and heavy[node]))
            if shared or is_read_by_product(node):
                kept.add(node)
    return {node: found for node, found in reads.items() if node in kept}


def recomputed(nodes: list[torch.fx.Node], reads: dict[torch.fx.Node, set[torch.fx.Node]]) -> list[Write]:
    """The writes where the backward pass computes anew what is neither a product nor a reduction of the forward's."""
    forward = {nodes[-1].all_input_nodes[-1]}  # the loss, and then all that it is made from
    for node in reversed(nodes):
        if node in forward:
            forward.update(node.all_input_nodes)
    writes: list[Write] = []
    again: set[torch.fx.Node] = set()

    def for_backward(node: torch.fx.Node) -> Value:
        # A weight in a smaller dtype is kept too: the compiler weighs it against the weight, as if that were not there.
        is_cast = not reads[node]
        if node not in forward or is_cast or name_of(node) in REDUCTIONS | PRODUCTS:
            return Value(node)
        if node not in again:
            again.add(node)
            writes.append(Write(Value(node, again=True), {for_backward(read) for read in reads[node]}))
        return Value(node, again=True)

    for node in reads:
        writes.append(Write(Value(node), {Value(n) if node in forward else for_backward(n) for n in reads[node]}))
    # What the forward pass does not read itself it does not put into memory.
    needed = {Value(nodes[-1])}
    kept = []
    for write in reversed(writes):
        if write.value in needed:
            needed |= write.reads
            kept.append(write)
    return kept[::-1]


def name_of(node: torch.fx.Node) -> str:
    """The operator's name without namespace and overload; empty for what is none."""
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[1] if schema is not None else ""


def is_view(node: torch.fx.Node) -> bool:
    """Whether the result lies in the memory of what it is made from."""
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    aliases = schema is not None and any(result.alias_info is not None for result in schema.returns)
    return aliases or name_of(node) in ("_unsafe_view", "reshape")


def is_read_by_product(node: torch.fx.Node) -> bool:
    return any(
        user.op == "output" or name_of(user) in PRODUCTS or (is_view(user) and is_read_by_product(user))
        for user in node.users
    )


# -------------------------------------------------------------------------------------------------- when there is none


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says so: a GPU's, the CPU's allocator's, or Python's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def remedies(micro_batch: int | str) -> str:
    """What can be done."""
    lower = "" if micro_batch == 1 else "lower parallel.micro_batch (or auto), "
    return (
        f"{lower}set parallel.activation_checkpointing full, loss.implementation chunked, take more ranks, "
        "or on GPUs parallel.cpu_offload"
    )


@contextlib.contextmanager
def running_out_is_explained(micro_batch: int | str) -> Iterator[None]:
    """Running out of memory becomes a ValueError of one line, which names what can be done."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(f"out of memory with parallel.micro_batch {micro_batch}: {remedies(micro_batch)}") from error
