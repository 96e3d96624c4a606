"""The benchmarks run, at a tiny size, and print tables of finite figures."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny

from benchmarks import gpu, scaling
from benchmarks.train import write_run
from modalities import presets
from modalities.config import to_dict
from modalities.model import num_params
from modalities.recipe import from_json, load

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """The path to a tiny recipe that does not compile."""
    path = tmp_path / "small.json"
    path.write_text(json.dumps(to_dict(tiny.recipe(tmp_path))))
    return str(path)


def command(*args: str) -> list[list[str]]:
    """Run a benchmark, which must succeed; the cells of the rows that it prints, of all of its tables."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    name = str(ROOT / "benchmarks" / args[0])
    done = subprocess.run([sys.executable, name, *args[1:]], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def figures(cells: list[str]) -> list[float]:
    """The numbers in the cells, all finite."""
    numbers = [float(text.replace(",", "")) for text in re.findall(r"\d[\d,]*\.?\d*(?:e[+-]\d+)?", " ".join(cells))]
    assert numbers and all(map(math.isfinite, numbers)) and "nan" not in " ".join(cells)
    return numbers


def test_train_compares_a_plain_loop_with_ours(recipe: str) -> None:
    contestants = ["plain eager float32", "ours float32"]
    rows = command(
        "train.py", "--recipe", recipe, "--seq-len", "32", "--micro-batch", "2", "--accumulate", "2", "--steps", "1",
        "--repeats", "1", "--contestants", *contestants,
    )  # fmt: skip
    assert [row[0] for row in rows] == ["step", *contestants]
    losses = {row[0]: figures(row[9:10]) for row in rows[1:]}
    for row in rows[1:]:
        assert len(figures(row[1:])) == 12
        assert figures(row[1:2])[0] > 0 and losses[row[0]][1] < losses[row[0]][0]  # it learns
    # The command fails where losses differ: here that they are of the same weights and batches, and not zeros.
    assert losses["ours float32"] == losses["plain eager float32"] and float(rows[2][-1]) < 1e-4


@pytest.mark.slow
@tiny.needs_compiler
def test_train_compiled(tmp_path: Path) -> None:
    base = tiny.recipe(tmp_path)
    path = tmp_path / "small.json"
    path.write_text(json.dumps(to_dict(replace(base, parallel=replace(base.parallel, compile="model")))))
    contestants = ["plain compiled bfloat16", "ours bfloat16", "ours float32", "trainer compiled bfloat16"]
    rows = command(
        "train.py", "--recipe", str(path), "--seq-len", "32", "--micro-batch", "2", "--steps", "1", "--repeats", "1",
        "--contestants", *contestants,
    )  # fmt: skip
    for row in rows[1:4]:
        assert len(figures(row[1:])) == 12
    # The Trainer needs a package that is not among ours.
    assert rows[4][1] == "did not run: ModuleNotFoundError: No module named 'accelerate'" or figures(rows[4][1:])


def test_train_refuses_an_unknown_contestant() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/train.py"), "--contestants", "ours float16"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: contestant 'ours float16' is not KIND DTYPE")


def test_ranks_are_measured_by_part_and_their_bytes_are_those_planned(recipe: str) -> None:
    rows = command(
        "scaling.py", "ranks", "--recipe", recipe, "--ranks", "1", "2", "--seq-len", "32", "--micro-batch", "2",
        "--steps", "1", "--repeats", "1", "--cores", "1", "--param-dtype", "float32",
    )  # fmt: skip
    one, two = rows[1], rows[2]
    assert one[0] == "1 × 1" and two[0] == "2 × 1" and figures(one[1:]) and figures(two[1:])
    assert float(one[5]) == float(one[6]) == 0.0
    # A rank of two sends half of what is gathered (blocks twice) and half of the sum, and gloo's all-reduce all of it.
    model = replace(tiny.MODEL, vocab_size=tiny.MODEL.padded_vocab_size)
    whole = num_params(model)
    root = model.padded_vocab_size * model.width + model.width
    gathered, summed = 4 * (root + 2 * (whole - root)) / 2 / 2**20, 4 * whole / 2 / 2**20
    assert float(two[5]) == pytest.approx(gathered + summed, abs=0.006)
    assert float(two[6]) == pytest.approx(gathered + 2 * summed, abs=0.006)
    parts = dict(zip(rows[3][1:], map(float, rows[5][1:]), strict=True))
    assert parts["sum"] == pytest.approx(sum(parts.values()) - parts["sum"], abs=0.5)
    assert all(parts[f"{name} ms"] > 0 for name in ("forward", "backward", "gather", "reduce", "optimizer"))


def test_parts_of_a_step_are_disjoint() -> None:
    spans = [
        ("step", 0.0, 100.0), ("FSDP::all_gather (blocks.0)", 10.0, 20.0), ("autograd::engine::a", 40.0, 70.0),
        ("FSDP::post_backward_reduce (blocks.0)", 50.0, 60.0), ("optimizer", 72.0, 90.0),
    ]  # fmt: skip
    ranks = [
        {"spans": spans, "collectives": [{"span": (11.0, 19.0)}, {"span": (51.0, 59.0)}, {"span": (91.0, 94.0)}]},
        {"spans": spans, "collectives": [{"span": (14.0, 19.0)}, {"span": (51.0, 59.0)}, {"span": (91.0, 92.0)}]},
    ]
    first, second = (scaling.parts_of(rank, [5.0, 8.0, 1.0]) for rank in ranks)
    assert first == {
        "forward": 30.0, "backward": 20.0, "gather": 7.0, "reduce": 10.0, "optimizer": 18.0, "waiting": 5.0,
        "rest": 10.0,
    }  # fmt: skip
    assert second["waiting"] == 0.0 and sum(second.values()) == 100.0
    assert scaling.parts(ranks)["waiting"] == 2.5


def test_reckoned_gpus() -> None:
    rows = command("scaling.py", "gpus", "--gpus", "8", "16384", "--shards", "0", "8")
    assert [row[:2] for row in rows[1:]] == [["8", "8"], ["16,384", "16,384"], ["16,384", "8"]]
    rates = [figures(row[7:8])[0] for row in rows[1:]]
    assert rates[0] == pytest.approx(6667, rel=0.01)  # torchtitan's
    assert rates[1] < rates[2] < rates[0]  # rings of 16,384 are slow, which is what copies of the model are for


def test_a_gpu_alone_waits_for_none_and_more_wait_longer() -> None:
    model, cluster = presets.llama3_8b(), scaling.Cluster()
    root = scaling.num_params_of_root(model)
    unit = (num_params(model) - root) // model.num_layers
    assert root + model.num_layers * unit == num_params(model)
    work = scaling.Work(flops=1e15, root=root, unit=unit, units=model.num_layers)
    alone = scaling.step_time(work, cluster, 1, 1)
    assert alone["communication"] == 0.0 and alone["exposed"] == pytest.approx(0.0)
    assert alone["compute"] == pytest.approx(1e15 / (989e12 * cluster.mfu))
    waits = [scaling.step_time(work, cluster, 2**n, 2**n)["communication"] for n in range(8)]
    assert waits == sorted(waits)
    # Where communication takes longer than all computation, the step takes that long.
    slow = scaling.step_time(work, replace(cluster, network=1e9), 64, 64)
    assert slow["total"] == pytest.approx(slow["communication"] + slow["optimizer"])


def test_gpu_grid_on_the_cpu_has_a_row_for_a_refusal() -> None:
    rows = command(
        "gpu.py", "--device", "cpu", "--tiny", "--models", "llama_1b", "--attention", "sdpa", "flash",
        "--compile-mode", "off", "--micro-batch", "2", "--steps", "2",
    )  # fmt: skip
    assert [row[:5] for row in rows[1:]] == [
        ["llama_1b (tiny)", "bfloat16", backend, "off", "1 × 2 × 32"] for backend in ("sdpa", "flash")
    ]
    assert len(figures(rows[1][5:])) == 9 and figures(rows[1][5:6])[0] > 0
    assert rows[2][5].startswith("did not run: model.attention 'flash' cannot run here")


@pytest.mark.slow
@tiny.needs_compiler
@pytest.mark.parametrize("mode", ["block", "default"])
def test_gpu_compiled_on_the_cpu(mode: str) -> None:
    rows = command(
        "gpu.py", "--device", "cpu", "--tiny", "--models", "gpt2_124m", "--compile-mode", mode, "--micro-batch", "2",
        "--steps", "2", "--dtype", "float32",
    )  # fmt: skip
    assert len(figures(rows[1][5:])) == 9


@pytest.mark.parametrize("name", gpu.MODELS)
def test_gpu_measures_the_models_of_the_recipes(name: str) -> None:
    settings = {"dtype": "bfloat16", "attention": "auto", "compile": "off", "micro_batch": 1, "seq_len": 1}
    setting = gpu.Setting(model=name, accumulate=1, steps=1, device="cpu", tiny=False, **settings)  # type: ignore[arg-type]
    recipe, _ = load(name)
    assert gpu.model_of(setting) == recipe.model and gpu.MODELS[name][0] == recipe.data.seq_len


def test_gpu_needs_torch_and_numpy_alone() -> None:
    settings = {"dtype": "float32", "attention": "manual", "compile": "off", "micro_batch": 1, "seq_len": 8}
    setting = gpu.Setting(model="gpt2_60m", accumulate=1, steps=1, device="cpu", tiny=True, **settings)  # type: ignore[arg-type]
    missing = ("tyro", "tokenizers", "datasets", "safetensors", "tensorboard", "orjson", "matplotlib", "jinja2", "tqdm")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing})); sys.path.insert(0, {str(ROOT)!r})\n"
        f"from benchmarks import gpu; gpu.contest(gpu.Setting(**{asdict(setting)!r}))"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(map(math.isfinite, json.loads(done.stdout.splitlines()[-1])["losses"]))


def test_a_run_of_one_model_has_batches_enough(tmp_path: Path, recipe: str) -> None:
    run = from_json(write_run(tmp_path, recipe, 3, 4, 2, 32))
    assert run.steps == 3 and run.data.global_batch == 4 and run.parallel.micro_batch == 2
    assert run.model.vocab_size == run.model.padded_vocab_size and (tmp_path / "words.pbin").stat().st_size > 3 * 4 * 32
