"""Where the time of chosen steps goes: a Chrome trace for each rank, a table, and on a GPU its memory's history.

It watches from outside: what is computed is the same to the bit. It knows operators by their names alone.
"""

import contextlib
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

Watch = Callable[[int], AbstractContextManager[None]]

# The group of an operator: the first whose pattern is found in its name, or in the name of one that it is a part of.
WHOLE = {
    "communication": r"nccl|gloo|c10d|fsdp::|all_?gather|all_?reduce|reduce_?scatter|wait_tensor",
    "optimizer": r"^optimizer$|adam|muon",
    "loss": r"cross_?entropy|nll_?loss|log_?softmax|logsumexp",
    "attention": r"attention|flash|fmha|sdpa",
    "batch": r"^batch$",
}
# Or, else, the first that is found in its own name.
OWN = {
    "matmul": r"gemm|::_?(add|b|badd)?(mm|mv)\b|linear|matmul|nvjet|cutlass|cublas|xmma|fused_mm|mkldnn",
    "copies": r"memcpy|memset|copy|::to$|::cat$|clone|contiguous|fill_|zero",
    "elementwise": r"^aten::|kernel",
}
OTHER = "between operators"
# What a compiler fused of elementwise parts is named after all of them, and after the operators that they lead to.
FUSED = r"cpp_fused|triton_(poi|red|per)_"


def span(name: str) -> AbstractContextManager[Any]:
    """A part of a step that has this name in a trace; nothing where none is taken."""
    recording = torch.autograd.profiler._is_profiler_enabled
    return record_function(name) if recording else contextlib.nullcontext()


def parse_steps(text: str) -> range:
    """The steps that "10-12" or "10" means, both ends included; a ValueError for what means none."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"--profile {text!r} is not a range of steps, counted from 1; write --profile 10-12")
    return range(first, last + 1)


def choose_steps(text: str | None, done: int, total: int) -> range | None:
    """The steps that --profile `text` means in a run of `total` steps that goes on after step `done`; None without it.

    Empty, it leaves the choice: three steps, when the run has warmed up if it is so long. A ValueError if the run does
    not come by all of them.
    """
    if text is None:
        return None
    if done >= total:
        raise ValueError(f"--profile: this run is already trained to its end, step {total}; give another --name")
    last = min(done + 12, total)
    steps = parse_steps(text) if text else range(max(done + 1, last - 2), last + 1)
    if not done < steps[0] <= steps[-1] <= total:
        raise ValueError(
            f"--profile {steps[0]}-{steps[-1]}: this run has the steps {done + 1}-{total} before it; choose among them"
        )
    return steps


@contextlib.contextmanager
def watching(
    steps: range | None, folder: Path, rank: int, device: torch.device, say: Callable[[str], None], aside: Watch
) -> Iterator[Watch]:
    """`with watch(n):` around step n writes what happens in `steps` to `folder`, and says the table after the last.

    It writes within `aside(n)`, for that takes time which is not the step's.
    """
    if not steps:
        yield lambda step: contextlib.nullcontext()
        return
    on_gpu = device.type == "cuda"
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])])
    name = f"steps-{steps[0]}-{steps[-1]}-rank-{rank}"

    def write() -> None:
        profiler.stop()
        profiler.export_chrome_trace(str(folder / f"{name}.json"))
        if on_gpu:
            torch.cuda.memory._dump_snapshot(str(folder / f"{name}-memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        say(table(profiler.events(), steps, on_gpu) + f"\n    {folder}: traces of all ranks, for ui.perfetto.dev")

    @contextlib.contextmanager
    def watch(step: int) -> Iterator[None]:
        if step not in steps:
            yield
            return
        if step == steps[0]:
            folder.mkdir(parents=True, exist_ok=True)
            if on_gpu:
                torch.cuda.memory._record_memory_history(max_entries=1_000_000)
            profiler.start()
        with record_function(f"step {step}"):
            yield
            if on_gpu:  # what a step started is to be counted in it
                torch.cuda.synchronize(device)
        if step == steps[-1]:
            with aside(step):
                write()

    with names_in_compiled_code(not on_gpu):
        yield watch


@contextlib.contextmanager
def names_in_compiled_code(wanted: bool) -> Iterator[None]:
    """Code that is compiled for the CPU meanwhile tells a profiler of its kernels, as that for GPUs always does."""
    if not wanted:
        yield
        return
    import torch._inductor.config

    with torch._inductor.config.patch("cpp.enable_kernel_profile", True):
        yield


@functools.cache
def group(path: tuple[str, ...]) -> str:
    """The group of the operator or kernel whose name ends `path`, after the names of those that it is a part of."""
    if re.search(FUSED, path[-1]):
        return "loss" if re.search(WHOLE["loss"], path[-1]) else "fused elementwise"
    for groups, names in ((WHOLE, path), (OWN, path[-1:])):
        for name, pattern in groups.items():
            if any(re.search(pattern, one, re.IGNORECASE) for one in names):
                return name
    return OTHER


def spans(events: Iterable[Any], steps: range, on_gpu: bool) -> Iterator[tuple[tuple[str, ...], float]]:
    """(names of an operator from the outermost, its own time [µs]) of all that happens in `steps`.

    On a GPU the time of its kernels; else that of the thread which drives the step, without the parts that have
    names themselves, so that these times make up the steps.
    """
    roots = {f"step {step}" for step in steps}
    thread = next(event.thread for event in events if event.name in roots)
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        path = path_of(event)
        if on_gpu:
            yield from (((*path, kernel.name), kernel.duration) for kernel in event.kernels)
        elif event.thread == thread and path[0] in roots:
            yield path, event.self_cpu_time_total


def path_of(event: Any) -> tuple[str, ...]:
    """The names of an event's parents from the outermost, and its own."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return tuple(reversed(names))


def table(events: Iterable[Any], steps: range, on_gpu: bool, top: int = 10) -> str:
    """The time of each group and of the `top` operators, a step, and as a share of the time that the steps took."""
    wall = sum(event.time_range.elapsed_us() for event in events if event.name in {f"step {step}" for step in steps}
               and event.device_type == DeviceType.CPU)  # fmt: skip
    groups: dict[str, float] = defaultdict(float)
    operators: dict[tuple[str, str], list[float]] = defaultdict(list)
    for path, time in spans(events, steps, on_gpu):
        groups[group(path)] += time
        operators[group(path), path[-1]].append(time)
    if on_gpu:
        groups["no kernel running (at least)"] = max(0.0, wall - sum(groups.values()))
    named = [item for item in operators.items() if item[0][0] != OTHER]

    def row(time: float, name: str) -> str:
        return f"    {time / wall:>7.1%} {time / len(steps) / 1000:>10.2f} ms  {name}"

    rows = [row(time, name) for name, time in sorted(groups.items(), key=lambda item: -item[1])]
    for (which, name), times in sorted(named, key=lambda item: -sum(item[1]))[:top]:
        rows.append(row(sum(times), f"{len(times) // len(steps)} × {name[:80]} ({which})"))
    where = "its kernels" if on_gpu else "the thread that drives it"
    head = f"steps {steps[0]}-{steps[-1]}: {wall / len(steps) / 1000:.2f} ms a step; where the time of {where} went:"
    return "\n".join((head, *rows[: len(groups)], f"  the {top} longest operators:", *rows[len(groups) :]))
