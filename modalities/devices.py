"""What a device can do at most, how much memory a process has taken of it, and how much there is left to take."""

import contextlib
import ctypes
import itertools
import json
import os
import platform
import re
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from modalities.compiling import user_cache

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SMALL, KEPT = 64 << 20, 512 << 20
"""Bytes of weights up to which, and of freed memory that, a process on a CPU keeps."""


@dataclass(frozen=True)
class Device:
    """One device after its maker's data sheet, at full power."""

    flops: float
    """Dense bf16 FLOP/s with fp32 sums; where a sheet gives the figure with sparsity, half of it."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Of that memory [bytes/s]."""
    source: str


# By the whole words that torch.cuda.get_device_name() contains; the first that fits holds.
DEVICES = {
    "A100-SXM4-40GB": Device(312e12, 40e9, 1.555e12, "NVIDIA A100 datasheet, June 2021"),
    "A100-PCIE-40GB": Device(312e12, 40e9, 1.555e12, "NVIDIA A100 datasheet, June 2021"),
    "A100 80GB PCIe": Device(312e12, 80e9, 1.935e12, "NVIDIA A100 datasheet, June 2021"),
    "A100": Device(312e12, 80e9, 2.039e12, "NVIDIA A100 datasheet, June 2021: SXM, 80 GB"),
    "H100 PCIe": Device(756e12, 80e9, 2.0e12, "NVIDIA H100 PCIe product brief, November 2022"),
    "H100 NVL": Device(835e12, 94e9, 3.9e12, "NVIDIA H100 datasheet, 2024: NVL"),
    "H100": Device(989e12, 80e9, 3.35e12, "NVIDIA H100 datasheet, 2024: SXM"),
    "H200 NVL": Device(836e12, 141e9, 4.8e12, "NVIDIA H200 datasheet, 2024: NVL"),
    "H200": Device(989e12, 141e9, 4.8e12, "NVIDIA H200 datasheet, 2024: SXM"),
    "B200": Device(2250e12, 180e9, 8.0e12, "NVIDIA DGX B200 datasheet, 2024: an eighth of the machine"),
    "MI300X": Device(1307e12, 192e9, 5.3e12, "AMD Instinct MI300X datasheet, 2023"),
}


def find(name: str) -> Device | None:
    """The device that a driver calls `name`; None for one that is not in the table."""
    # Whole words: an RTX A1000 is no A100, and a GB200 has other figures than a B200.
    return next((device for model, device in DEVICES.items() if re.search(rf"\b{re.escape(model)}\b", name)), None)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that the share of the peak (MFU) is reckoned against.

    Of a GPU in the table its bf16 figure, whatever `dtype` is computed in, as MFU is published; of any other device
    what a matrix product in `dtype` reaches, which is measured once and kept in `devices.json` in the user's cache;
    remove that file if the machine was busy then.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    if device.type == "cuda" and (known := find(name)):
        return known.flops
    key = f"{name}, {torch.get_num_threads()} threads, {dtype}".replace("torch.", "")
    path = user_cache() / "devices.json"
    measured = read_json(path)
    if key not in measured:
        measured[key] = measured_flops(device, dtype)
        write_json(path, measured)
    return measured[key]


def measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """The most FLOP/s that a square matrix product reaches within `seconds`, each taken by itself."""
    # The best size differs between processors, for it is what their caches hold.
    sizes = (1024, 1536) if device.type == "cpu" else (4096, 8192)
    pairs = [torch.ones(2, size, size, device=device, dtype=dtype) for size in sizes]
    best, end = 0.0, time.perf_counter() + seconds
    for a, b in itertools.cycle(pairs):
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        # The best and not the mean: other work on the machine only ever takes away.
        best = max(best, 2 * len(a) ** 3 / (time.perf_counter() - start))
        if time.perf_counter() > end:
            break
    return best


def processor() -> str:
    """What the CPU is called."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held: of a GPU's memory in tensors, or resident in the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not getrusage, whose peak a process inherits from the one that started it.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def available(device: torch.device, ranks_here: int = 1) -> float:
    """Bytes that this process may still take: of its GPU's memory, or its part of what is left of the host's.

    On Linux that is the least of what the kernel says is available, and what control groups and RLIMIT_AS leave.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(*(limit / ranks_here for limit in host_limits()), process_limit())


def host_limits(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """What is left for all processes together, as far as the system tells; `groups`: where control groups lie."""
    meminfo = proc / "meminfo"
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        yield 1024 * int(lines["MemAvailable"].split()[0])
    own = proc / "self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            yield from group_limits(groups, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            files = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            yield from group_limits(groups / "memory", path, *files)
    yield float("inf")


def group_limits(root: Path, path: str, limit: str, used: str, cache: str) -> Iterator[float]:
    """What the control group `path` and those that it lies in leave; in a container it may itself be the root."""
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        files = [folder / name for name in (limit, used, "memory.stat")]
        if not folder.is_relative_to(root) or not all(file.exists() for file in files):
            continue
        most, now, stat = (file.read_text() for file in files)
        if most.strip() != "max":
            # Files that were read and are no longer in use count as used, but make room before memory is refused.
            idle = dict(line.split() for line in stat.splitlines()).get(cache, 0)
            yield int(most) - int(now) + int(idle)


def process_limit() -> float:
    """What RLIMIT_AS leaves to this process."""
    if resource is None or (soft := resource.getrlimit(resource.RLIMIT_AS)[0]) == resource.RLIM_INFINITY:
        return float("inf")
    pages = Path("/proc/self/statm").read_text().split()[0]
    return soft - int(pages) * os.sysconf("SC_PAGE_SIZE")


def reset_peak_of_process() -> int:
    """Let Linux forget the most that was resident so far; bytes that are now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # the peak of all time then counts, which is more
        return 0


def keep_freed_memory(params: Iterable[torch.Tensor], large_too: bool = False) -> None:
    """Where the weights of a step on a CPU are small, have glibc keep what is freed, up to `KEPT` bytes, for the next.

    By itself it gives all above 64 MB back to the kernel, and gets the activations of each step page by page anew: of
    the step of 1M parameters that is a third, of that of 60M a seventh, which costs 0.2 to 0.4 GB there. `large_too`:
    where weights are large, up to 2 GiB. Whoever has set its variables has chosen.
    """
    params = list(params)
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    small = sum(param.nbytes for param in params) <= SMALL
    if sys.platform == "linux" and params[0].device.type == "cpu" and (small or large_too) and not chosen:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # which musl has not
        if mallopt is not None:
            if small:
                mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: from there on blocks go back at once, as by themselves
            else:
                mallopt(-4, 0)  # M_MMAP_MAX: none do
            mallopt(-1, KEPT if small else 2**31 - 1)  # M_TRIM_THRESHOLD


def read_json(path: Path) -> dict[str, float]:
    """What was measured before; nothing where there is no such file, or not a whole one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, values: dict[str, float]) -> None:
    """Write `values` beside `path` and rename: several runs may start at once, on nodes that share a home."""
    beside = path.with_suffix(f".{os.getpid()}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):  # no home to write to: it is measured anew each time
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(json.dumps(values, indent=2) + "\n")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
