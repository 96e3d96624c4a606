"""How a step's time changes with the number of ranks: measured on this machine's cores, and reckoned for GPUs.

    python benchmarks/scaling.py ranks [--recipe gpt2_60m --ranks 1 2 4 --seq-len 512 --micro-batch 8]
    python benchmarks/scaling.py gpus [--recipe llama_8b --mfu 0.39 --gpus 8 64 1024 16384]

`ranks`: tokens of a rank stay, so the batch grows; each rank is a process (gloo, FSDP2) with its share of the cores.
`gpus` prints what it assumes. What it leaves out is not nothing: torchtitan measured 2.3 % less for each of 128 GPUs
than for each of 8 (6,514 and 6,667 tokens/s), of which it reckons none.
"""

import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from modalities.model import ModelConfig
    from modalities.recipe import Recipe

ROOT = Path(__file__).parents[1]
Dtype = Literal["float32", "bfloat16"]
WARMUP = 2
PARTS = ("forward", "backward", "gather", "reduce", "optimizer", "waiting", "rest")
BYTES = {"float": 4, "c10::BFloat16": 2, "long int": 8, "double": 8}  # as the profiler calls dtypes

# ---------------------------------------------------------------------------------------------------- ranks, measured


def contest(recipe_path: str, steps: int) -> None:
    """On each rank: train; the first prints the seconds of the steps, the parts of one, and the bytes that it sent."""
    import torch
    from torch.profiler import profile, record_function

    from modalities import dist, loop
    from modalities.recipe import from_json

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    recipe = from_json(Path(recipe_path))
    with dist.setup() as world:
        run, state = loop.build(recipe, world)
        seconds = []
        for _ in range(WARMUP + steps):
            dist.barrier()
            began = time.perf_counter()
            state, metrics = run.train_step(state, run.data.batch(state.samples))
            loss = float(metrics["loss"])
            seconds.append(time.perf_counter() - began)
        dist.barrier()
        with profile(record_shapes=True) as profiler, record_function("step"):
            state, metrics = run.train_step(state, run.data.batch(state.samples))
            float(metrics["loss"])
        ranks = dist.gather_objects(recorded(profiler.events()))
        if world.is_main:
            spent = parts(ranks)
            sent = [sum(bytes_sent(world.size, *one["sent"]) for one in rank["collectives"]) for rank in ranks]
            facts = {"seconds": seconds[WARMUP:], "loss": loss, "parts": spent, "planned": planned(recipe, world.size)}
            print(f"\n{json.dumps({**facts, 'sent': statistics.mean(sent)})}", flush=True)


def recorded(events: Iterable[Any]) -> dict[str, Any]:
    """Of a rank's profile what `parts` needs: spans (name, begin, end) of the thread that drives the step, and
    gloo's own [ms], with the name, elements and bytes an element of what it was given.
    """
    events = list(events)
    thread = next(event.thread for event in events if event.name == "step")
    spans, collectives = [], []
    for event in events:
        name, begin, end = event.name, event.time_range.start / 1000, event.time_range.end / 1000
        if name.startswith("gloo:"):
            dtype = event.input_dtypes[0] if event.input_dtypes else ""
            sizes = event.input_shapes[0] if event.input_shapes else []
            collectives.append({"span": (begin, end), "sent": (name, math.prod(sizes), BYTES.get(dtype, 0))})
        elif event.thread == thread and name.startswith(("step", "optimizer", "FSDP::", "autograd::engine")):
            spans.append((name, begin, end))
    return {"spans": spans, "collectives": sorted(collectives, key=lambda one: one["span"])}


def parts(ranks: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of a step by part, the mean of the ranks.

    gather, reduce: as long as FSDP2 holds up the thread that drives the step; waiting: what a collective took longer
    than on the rank where it was shortest, which is the one that came last. Of one process whose step is compiled as
    a whole, forward is all of the gradient.
    """
    durations = ([end - begin for begin, end in (one["span"] for one in rank["collectives"])] for rank in ranks)
    shortest = [min(times) for times in zip(*durations, strict=True)]
    each = [parts_of(rank, shortest) for rank in ranks]
    return {name: statistics.mean(one[name] for one in each) for name in PARTS}


def parts_of(rank: dict[str, Any], shortest: list[float]) -> dict[str, float]:
    """`parts` of one rank, whose collectives took at least `shortest` on any."""
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, begin, end in rank["spans"]:
        spans[part_of(name)].append((begin, end))
    ((step_begin, step_end),), ((optimizer_begin, optimizer_end),) = spans["step"], spans["optimizer"]
    backward = spans["backward"] or [(optimizer_begin, optimizer_begin)]
    begins = {
        "forward": step_begin,
        "backward": min(begin for begin, _ in backward),
        "before the optimizer": max(end for _, end in backward),
        "optimizer": optimizer_begin,
        "rest": optimizer_end,
    }
    ends = [*list(begins.values())[1:], step_end]
    spent = dict.fromkeys(PARTS, 0.0)
    spent |= {name: end - begin for (name, begin), end in zip(begins.items(), ends, strict=True)}

    def around(moment: float) -> str:
        return [name for name, begin in begins.items() if begin <= moment][-1]

    held_up = [(name, begin, end) for name in ("gather", "reduce") for begin, end in spans[name]]
    for name, begin, end in held_up:
        spent[name] += end - begin
        spent[around(begin)] -= end - begin
    for one, least in zip(rank["collectives"], shortest, strict=True):
        begin, end = one["span"]
        inside = (name for name, first, last in held_up if first <= begin <= last)
        spent[next(inside, around(begin))] -= end - begin - least
        spent["waiting"] += end - begin - least
    spent["rest"] += spent.pop("before the optimizer")
    return spent


def part_of(name: str) -> str:
    if name.startswith("FSDP::all_gather"):
        return "gather"
    if name.startswith("FSDP::post_backward_reduce"):
        return "reduce"
    if name.startswith(("autograd::engine", "FSDP::root_post_backward", "FSDP::pre_backward")):
        return "backward"
    return name.split(" ")[0]


def bytes_sent(ranks: int, name: str, elements: int, itemsize: int) -> float:
    """Bytes that a rank sends in gloo's ring, where it was given `elements`."""
    times = {"gloo:all_gather": ranks - 1, "gloo:all_reduce": 2 * (ranks - 1) / ranks}
    return times.get(name, (ranks - 1) / ranks) * elements * itemsize


def planned(recipe: "Recipe", ranks: int) -> float:
    """Bytes that a rank sends in a step by FSDP2's plan with one micro-batch.

    Each unit is gathered for the forward pass, and if it is freed after it again for the backward pass; the rest of
    the model once. Gradients are summed and cut once. Of what is gathered or summed a rank sends (ranks - 1) / ranks.
    """
    import torch

    from modalities.model import num_params

    whole, root = num_params(recipe.model), num_params_of_root(recipe.model)
    parallel = recipe.parallel
    gathers = 2 if parallel.reshard_after_forward else 1
    gathered = (root + gathers * (whole - root)) * parallel.compute_dtype.itemsize
    reduced = whole * getattr(torch, parallel.reduce_dtype).itemsize
    return (ranks - 1) / ranks * (gathered + reduced)


def num_params_of_root(model: "ModelConfig") -> int:
    """Parameters outside of blocks."""
    from modalities.model import num_params

    one, two = (num_params(replace(model, num_layers=layers)) for layers in (1, 2))
    return one - (two - one)


def run(ranks: int, threads: int, recipe_path: Path, steps: int) -> dict[str, Any]:
    """What rank 0 of so many processes printed; exits with what one that failed complained of."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--contest", json.dumps([str(recipe_path), steps])]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": f"{threads}", "WORLD_SIZE": f"{ranks}"}
    settings |= {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"}
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            environment = {**os.environ, **settings, "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
            with open(f"{folder}/{rank}.out", "w") as out, open(f"{folder}/{rank}.err", "w") as err:
                processes.append(subprocess.Popen(command, stdout=out, stderr=err, env=environment))
        codes: list[int | None] = [None]
        while None in codes and not any(codes):
            time.sleep(0.1)
            codes = [process.poll() for process in processes]
        failed = next((rank for rank, code in enumerate(codes) if code), None)
        for process in processes:
            process.kill()  # those that would wait for one that failed
            process.wait()
        if failed is not None:
            sys.exit(f"rank {failed} of {ranks} failed: {Path(folder, f'{failed}.err').read_text()[-2000:]}")
        return json.loads(Path(folder, "0.out").read_text().splitlines()[-1])


def measure(
    *,
    recipe: str = "gpt2_60m",
    ranks: tuple[int, ...] = (1, 2, 4),
    seq_len: int = 512,
    micro_batch: int = 8,
    steps: int = 3,
    repeats: int = 2,
    cores: int = len(os.sched_getaffinity(0)),
    param_dtype: Dtype = "bfloat16",
    reduce_dtype: Dtype = "float32",
    reshard_after_forward: bool = True,
) -> None:
    """Print tokens/s, bytes and parts of a step on CPU ranks.

    Args:
        recipe: Whose model and optimizer.
        ranks: How many; the first is what the others are compared with.
        seq_len: Tokens of a sequence.
        micro_batch: Sequences of a rank and step.
        steps: Timed steps of a launch.
        repeats: Launches of each number of ranks; they take turns.
        cores: Threads of all ranks together.
        param_dtype: As parallel.param_dtype.
        reduce_dtype: As parallel.reduce_dtype.
        reshard_after_forward: As parallel.reshard_after_forward.
    """
    from benchmarks.train import write_run
    from modalities.config import to_dict
    from modalities.recipe import from_json

    found: dict[int, list[dict[str, Any]]] = {number: [] for number in ranks}
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for number in ranks:
            own = Path(folder, f"{number}")
            own.mkdir()
            paths[number] = write_run(own, recipe, WARMUP + steps + 1, number * micro_batch, micro_batch, seq_len)
            base = from_json(paths[number])
            parallel = replace(
                base.parallel,
                param_dtype=param_dtype,
                reduce_dtype=reduce_dtype,
                reshard_after_forward=reshard_after_forward,
            )
            paths[number].write_text(json.dumps(to_dict(replace(base, parallel=parallel))))
        for _ in range(repeats):
            for number in ranks:
                found[number].append(run(number, max(1, cores // number), paths[number], steps))
    tokens = micro_batch * seq_len
    print(f"{recipe}'s model, {tokens:,} tokens a rank and step, {cores} cores, {param_dtype}, sums in {reduce_dtype}")
    print("\n| ranks × threads | tokens/s | ratio | median s | least – most | planned MiB | sent MiB | loss |")
    print("|---|---|---|---|---|---|---|---|")
    base_rate = 0.0
    for number, runs in found.items():
        seconds = sorted(s for one in runs for s in one["seconds"])
        middle = statistics.median(seconds)
        rate = number * tokens / middle
        base_rate = base_rate or rate
        print(
            f"| {number} × {max(1, cores // number)} | {rate:,.0f} | {rate / base_rate:.2f}× | {middle:.3f} "
            f"| {seconds[0]:.3f} – {seconds[-1]:.3f} | {runs[0]['planned'] / 2**20:,.2f} "
            f"| {runs[0]['sent'] / 2**20:,.2f} | {runs[0]['loss']:.4f} |"
        )
    print(f"\n| ranks | {' | '.join(f'{name} ms' for name in PARTS)} | sum |\n|{'---|' * (len(PARTS) + 2)}")
    for number, runs in found.items():
        times = [statistics.median(one["parts"][name] for one in runs) for name in PARTS]
        print(f"| {number} | {' | '.join(f'{time_ms:,.1f}' for time_ms in times)} | {sum(times):,.1f} |")
    print(
        "\nMiB are those that a rank sends in a step, planned by FSDP2 and in gloo's ring, where a reduce-scatter is "
        "an all-reduce. Parts are of a step under the profiler, the mean of the ranks. gather, reduce: FSDP2 holds up "
        "the step; waiting: for a rank that comes later; rest: the sum of the loss over ranks. Of one process, whose "
        "step is compiled as a whole, forward is all of the gradient. Ranks beyond the cores share them."
    )


# ----------------------------------------------------------------------------------------------------- GPUs, reckoned


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What is assumed of GPUs and of what joins them."""

    peak_flops: float = 989e12
    """FLOP/s of a GPU, dense bf16 (NVIDIA H100 datasheet, SXM)."""
    mfu: float = 0.394
    """Share of it that the computation of a GPU reaches by itself; with this, 8 GPUs do the 6,667 tokens/s each that
    torchtitan measured for Llama 3.1 8B (FSDP2, compiled: its benchmarks/llama3_h100_202412_torchtitan.md)."""
    memory_bandwidth: float = 3.35e12
    """Of a GPU's memory [bytes/s] (the same datasheet)."""
    gpus_per_node: int = 8
    nvlink: float = 450e9
    """Between GPUs of a node, each way [bytes/s a GPU] (the same datasheet: 900 GB/s both ways)."""
    network: float = 50e9
    """Between nodes, each way [bytes/s a GPU] (NVIDIA DGX H100 datasheet: 400 Gb/s a GPU)."""
    efficiency: float = 0.8
    """Share of these that collectives reach."""
    nvlink_latency: float = 3.4e-6
    """Of a step of a ring within a node [s] (NCCL src/graph/tuning.cc: ring, Simple protocol)."""
    network_latency: float = 14e-6
    """Of a step of a ring between nodes [s] (the same)."""
    launch: float = 8.4e-6
    """Of any collective [s] (the same, baseLat)."""

    def bandwidth(self, nodes: int, members: int) -> float:
        """Bytes/s at which a ring that has `members` GPUs in each of `nodes` passes a GPU by.

        NCCL makes a ring for each of the members' network cards, so that a node's cards work together.
        """
        return self.efficiency * (self.nvlink if nodes == 1 else min(self.nvlink, members * self.network))

    def latency(self, nodes: int, members: int) -> float:
        return self.launch + (nodes - 1) * self.network_latency + nodes * (members - 1) * self.nvlink_latency

    def gather(self, size: float, nodes: int, members: int) -> float:
        """Seconds of an all-gather to `size` bytes, or of a reduce-scatter of them, in a ring."""
        ranks = nodes * members
        if ranks == 1:
            return 0.0
        return self.latency(nodes, members) + (ranks - 1) / ranks * size / self.bandwidth(nodes, members)

    def all_reduce(self, size: float, nodes: int, members: int) -> float:
        """Seconds of an all-reduce: twice a ring, or up and down a tree, which has less latency."""
        ranks = nodes * members
        if ranks == 1:
            return 0.0
        deep = math.log2(nodes) * self.network_latency + (members - 1) * self.nvlink_latency
        around = self.latency(nodes, members) - self.launch
        moved = 2 * (ranks - 1) / ranks * size / self.bandwidth(nodes, members)
        return self.launch + 2 * min(deep, around) + moved


@dataclass(frozen=True, kw_only=True)
class Work:
    """A step of one GPU."""

    flops: float
    root: int
    """Parameters outside of units, gathered once and kept."""
    unit: int
    """Parameters of a unit."""
    units: int
    param_bytes: int = 2
    grad_bytes: int = 4


def step_time(work: Work, cluster: Cluster, gpus: int, shard: int) -> dict[str, float]:
    """Seconds of a step where `gpus` GPUs are groups of `shard` ranks that share a model: all, computing, waiting.

    The forward pass gathers each unit, the backward pass gathers it again and sums its gradient over the group, then
    over groups. Communication is behind computation but for the first gather and the last sum; where it takes longer,
    computation waits for it.
    """
    members = min(shard, cluster.gpus_per_node)
    group = (math.ceil(shard / cluster.gpus_per_node), members)
    copies = gpus // shard
    peers = min(copies, cluster.gpus_per_node // members)  # GPUs of a node that have the same part of the model
    others = (math.ceil(copies / peers), peers)

    def gather(params: int) -> float:
        return cluster.gather(params * work.param_bytes, *group)

    def reduce(params: int) -> float:
        own = cluster.gather(params * work.grad_bytes, *group)
        return own + cluster.all_reduce(params * work.grad_bytes / shard, *others)

    compute = work.flops / (cluster.peak_flops * cluster.mfu)
    params = work.root + work.units * work.unit
    first, last = gather(work.root) + gather(work.unit), reduce(work.root)
    forward = max(compute / 3, (work.units - 1) * gather(work.unit))
    backward = max(compute * 2 / 3, work.units * (gather(work.unit) + reduce(work.unit)))
    # AdamW reads weight, gradient and two means, and writes three of them, all fp32.
    optimizer = 28 * params / shard / cluster.memory_bandwidth
    total = first + forward + backward + last + optimizer
    behind = (2 * work.units - 1) * gather(work.unit) + work.units * reduce(work.unit)
    return {
        "total": total,
        "compute": compute,
        "optimizer": optimizer,
        "communication": first + last + behind,
        "exposed": total - compute - optimizer,
    }


def reckon(
    *,
    recipe: str = "llama_8b",
    gpus: tuple[int, ...] = (8, 64, 128, 512, 1024, 4096, 16_384),
    shards: tuple[int, ...] = (0, 64, 8),
    seq_len: int = 8192,
    micro_batch: int = 2,
    cluster: Cluster = Cluster(),
) -> None:
    """Print the time of a step on GPUs, reckoned from what is assumed of them.

    Args:
        recipe: Whose model.
        gpus: How many.
        shards: Ranks that share a copy of the model: 0 for all (FSDP), fewer is HSDP.
        seq_len: Tokens of a sequence.
        micro_batch: Sequences of a GPU and step; there is no accumulation.
        cluster: What is assumed.
    """
    from modalities import recipe as recipes
    from modalities.model import flops_per_token, num_params

    model = recipes.load(recipe)[0].model
    root, tokens = num_params_of_root(model), micro_batch * seq_len
    unit = (num_params(model) - root) // model.num_layers
    work = Work(flops=flops_per_token(model, seq_len) * tokens, root=root, unit=unit, units=model.num_layers)
    print(
        f"{recipe}'s model: {num_params(model):,} parameters, {model.num_layers} units; {tokens:,} tokens a GPU a step"
    )
    print("assumed: " + ", ".join(f"{name} {value:g}" for name, value in vars(cluster).items()))
    print(
        "assumed: weights gathered in bf16, gradients summed in fp32, forward a third of the computation; collectives "
        "are rings (sums over copies: or trees), a node's network cards work together, no switch sums; time = "
        "max(computation, communication) but for the first gather and the last sum; no GPU is slower than another, no "
        "link is shared with other jobs, communication takes nothing from computation, data is always there.\n"
    )
    print("| GPUs | a copy on | tokens a step | step ms | compute | communication | exposed | tokens/s a GPU | MFU |")
    print("|---|---|---|---|---|---|---|---|---|")
    for number in gpus:
        for shard in dict.fromkeys(shard or number for shard in shards if shard <= number):
            if number % shard or (shard > cluster.gpus_per_node and shard % cluster.gpus_per_node):
                raise ValueError(
                    f"{number} GPUs are not whole groups of {shard}, or these not whole nodes; change shards"
                )
            found = step_time(work, cluster, number, shard)
            rate = tokens / found["total"]
            times = (f"{1000 * found[name]:,.0f}" for name in ("total", "compute", "communication", "exposed"))
            print(
                f"| {number:,} | {shard:,} | {number * tokens:,} | {' | '.join(times)} | {rate:,.0f} "
                f"| {rate * work.flops / tokens / cluster.peak_flops:.1%} |"
            )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--contest"]:
        contest(*json.loads(sys.argv[2]))
    else:
        from modalities import cli

        commands: dict[str, Callable[..., None]] = {"ranks": measure, "gpus": reckon}
        description = "How a step's time changes with the number of ranks."
        cli.run(lambda args: cli.call_subcommand(commands, args, "benchmarks/scaling.py", description))
