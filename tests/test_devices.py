"""What a device can do is looked up or measured once, and what a process has held is what it has held."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modalities import devices

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name, flops",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 836e12),
        ("NVIDIA B200", 2250e12),
        ("AMD Instinct MI300X", 1307e12),
    ],
)
def test_devices_by_the_names_of_their_drivers(name: str, flops: float) -> None:
    found = devices.find(name)
    assert found is not None and found.flops == flops
    # From 100 to 400 FLOPs for each byte read: the sheets agree with each other.
    assert 100 < found.flops / found.bandwidth < 400 and found.source


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce RTX 4090", "NVIDIA A10", "NVIDIA RTX A1000", "NVIDIA A100X", "NVIDIA GB200", "NVIDIA GH200 480GB"],
)
def test_an_unknown_device_is_not_taken_for_another(name: str) -> None:
    assert devices.find(name) is None


MEMINFO = "MemTotal: 3000 kB\nMemFree: 10 kB\nMemAvailable:    2000 kB\n"
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def machine(folder: Path, cgroup: str, groups: dict[str, tuple[str, int, int]], version: tuple[str, str, str]) -> float:
    """The least limit of a machine with these control groups: folder → limit, used, and of that idle files [bytes]."""
    limit, used, cache = version
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/meminfo").write_text(MEMINFO)
    (folder / "proc/self/cgroup").write_text(cgroup)
    for name, (most, now, idle) in groups.items():
        group = folder / "cgroup" / name
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(f"{most}\n")
        (group / used).write_text(f"{now}\n")
        (group / "memory.stat").write_text(f"anon 7\ninactive_file {idle}\n{cache} {idle}\n")
    return min(devices.host_limits(folder / "proc", folder / "cgroup"))


def test_the_least_control_group_counts_and_its_idle_files_do_not(tmp_path: Path) -> None:
    path = "0::/jobs/mine/step\n"
    tree = {"jobs": ("900000", 500000, 0), "jobs/mine": ("max", 400000, 0), "jobs/mine/step": ("700000", 400000, 50000)}
    assert machine(tmp_path / "own", path, tree, VERSION_2) == 350000
    tree["jobs"] = ("900000", 650000, 50000)
    assert machine(tmp_path / "parent", path, tree, VERSION_2) == 300000
    others = {"jobs/another": ("1000", 0, 0)}
    assert machine(tmp_path / "none", path, others, VERSION_2) == 2000 * 1024
    # In a container the group may be seen as the root, by a path that is not there.
    assert machine(tmp_path / "container", path, {".": ("100000", 30000, 10000)}, VERSION_2) == 80000


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    lines = "5:cpu,cpuacct:/elsewhere\n4:memory:/slurm/job\n0::/\n"
    tree = {
        "memory": ("9223372036854771712", 800000, 0),
        "memory/slurm": ("600000", 500000, 90000),
        "memory/slurm/job": ("600000", 400000, 1000),
        "cpu/elsewhere": ("1", 0, 0),
    }
    assert machine(tmp_path, lines, tree, VERSION_1) == 190000


def test_a_file_that_cannot_be_put_in_place_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "devices.json").mkdir()
    devices.write_json(tmp_path / "devices.json", {"cpu": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["devices.json"]


def test_the_peak_of_a_cpu_is_measured_once_for_each_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = devices.peak_flops(CPU, torch.float32)
    # A product of the size that models have reaches no more than it, but for noise: other work on the machine.
    assert 1e9 < first < 1e15
    assert devices.peak_flops(CPU, torch.float32) == first, "read and not measured: no two measurements agree"
    devices.peak_flops(CPU, torch.bfloat16)
    kept = json.loads((tmp_path / "modalities" / "devices.json").read_text())
    assert len(kept) == 2 and all(devices.processor() in key for key in kept)
    assert list(tmp_path.rglob("*.*")) == [tmp_path / "modalities" / "devices.json"], "nothing half-written is left"


def test_a_cache_that_cannot_be_read_or_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "modalities").mkdir()
    (tmp_path / "modalities" / "devices.json").write_text('{"half')
    assert devices.peak_flops(CPU, torch.float32) > 1e9
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no-such")
    assert devices.peak_flops(CPU, torch.float32) > 1e9


def test_peak_memory_is_the_most_that_a_process_held_and_not_what_it_inherited() -> None:
    code = "import torch, sys; from modalities.devices import peak_memory; cpu = torch.device('cpu')\n" + (
        "before = peak_memory(cpu); held = torch.ones(2**26); del held; print(before, peak_memory(cpu))"
    )
    ballast = torch.ones(2**28)  # 1 GiB, which a child is not to count as its own
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(int, shown.split())
    assert after - before == pytest.approx(2**28, rel=0.1) and before < ballast.nbytes
