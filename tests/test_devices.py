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
        ("NVIDIA B200", 2250e12),
        ("AMD Instinct MI300X", 1307e12),
    ],
)
def test_devices_by_the_names_of_their_drivers(name: str, flops: float) -> None:
    found = devices.find(name)
    assert found is not None and found.flops == flops
    # From 100 to 400 FLOPs for each byte read: the sheets agree with each other.
    assert 100 < found.flops / found.bandwidth < 400 and found.source


def test_an_unknown_device_is_not_taken_for_another() -> None:
    assert devices.find("NVIDIA GeForce RTX 4090") is None and devices.find("NVIDIA A10") is None


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
