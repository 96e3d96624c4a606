"""A sweep in one program against its members one after another: from launch to picture, the steady step, memory.

    python benchmarks/sweep.py [--members 8 --steps 300 --seq-len 64 --batch 8 --repeats 3] [--parts launch step]

A 1.1M-parameter model (4 layers, width 128, 2,048 words drawn by Zipf's law), members of different learning rates.
launch: `python -m modalities.sweep` from starting Python until it ends, its picture drawn, against as many `train.py`
one after another, which draw theirs; all compiled, and caches warm. Neither samples, nor saves before the end.
step: in processes of their own, which take turns, the step of all members in one program against the compiled step of
one, `loop.build`'s; the ratio is that of one step of each member, so 1 is even. Memory is the peak of a step beyond
what the process had before it made the members, and beyond it the sum is what it is held against: weights and moments
of all members (12 bytes a parameter), and as many times what a step of one takes at its peak beyond those.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[1]
WARMUP = 3


def write_recipe(
    folder: Path, steps: int, seq_len: int, batch: int, width: int, vocab_size: int, dtype: str, compile: str
) -> Path:
    """`small.json` in `folder`, a recipe with data of its own."""
    import numpy as np

    from modalities.config import to_dict
    from modalities.pbin import write_pbin
    from modalities.recipe import load

    rng = np.random.default_rng(0)
    for name, sequences in (("train", 4096), ("val", 64)):
        with write_pbin(folder / f"{name}.pbin", vocab_size) as append:
            append(np.minimum(rng.zipf(1.2, sequences * seq_len + 1), vocab_size) - 1)
    base, _ = load("demo")
    recipe = replace(
        base,
        name="small",
        steps=steps,
        model=replace(base.model, vocab_size=vocab_size, width=width, num_heads=4, max_seq_len=seq_len),
        data=replace(
            base.data,
            train=(f"{folder / 'train.pbin'}",),
            val=(f"{folder / 'val.pbin'}",),
            tokenizer="",
            seq_len=seq_len,
            global_batch=batch,
        ),
        parallel=replace(base.parallel, micro_batch=batch, param_dtype=dtype, compile=compile),  # type: ignore[arg-type]
        eval=replace(base.eval, every=0),
        sample=replace(base.sample, every=0),
        checkpoint=replace(base.checkpoint, every=0),
        log=replace(base.log, tensorboard=False),
    )
    path = folder / "small.json"
    path.write_text(json.dumps(to_dict(recipe)))
    return path


def rates(members: int) -> list[float]:
    return [round(1e-4 * 2**i, 6) for i in range(members)]


def seconds_of(args: list[str], folder: Path) -> float:
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *args], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(args)} failed: {done.stderr}")
    return time.perf_counter() - began


def launch(folder: Path, path: Path, members: int, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of (the sweep, all runs one after another), each time; what both do first, to fill caches, is not in."""
    sweeps, runs = [], []
    grid = ",".join(map(str, rates(members)))
    for i in range(repeats + 1):
        sweep = ["-m", "modalities.sweep", "--recipe", str(path), "--grid", f"optim.lr={grid}", "--name", f"s{i}"]
        taken = seconds_of(sweep, folder)
        assert (folder / f"sweeps/s{i}/sweep.png").is_file()
        train = [str(ROOT / "train.py"), "--recipe", str(path), "--optim.lr"]
        # Of those that fill caches one is enough.
        chosen = rates(members) if i else rates(1)
        times = [seconds_of([*train, f"{lr}", "--name", f"r{i}-{k}"], folder) for k, lr in enumerate(chosen)]
        if i:
            sweeps.append(taken)
            runs.append(sum(times))
            print(f"sweep {taken:.1f} s, runs {sum(times):.1f} s", file=sys.stderr)
    return sweeps, runs


def contest(kind: str, path: str, members: int, steps: int) -> None:
    """In a process of its own: print the seconds of each step, and the peak of one beyond what was there before."""
    from benchmarks.loss import peak, reset_peak
    from modalities import dist, loop
    from modalities import members as together
    from modalities.model import num_params
    from modalities.recipe import from_json

    recipe = replace(from_json(Path(path)), steps=WARMUP + steps + 1)
    with dist.setup() as world:
        device = world.device.type
        advance: Callable[[Any], Any]
        if kind == "together":
            each = [replace(recipe, optim=replace(recipe.optim, lr=lr)) for lr in rates(members)]
            functions, state = together.build(each, world)
            losses = state.opt_state["record"]["losses"]

            def advance(state: Any) -> Any:
                state = functions.step(state)
                assert losses[state.step - 1].isfinite().all()  # waits for the device
                return state
        else:
            run, state = loop.build(recipe, world)

            def advance(state: Any) -> Any:
                state, metrics = run.train_step(state, run.data.batch(state.samples))
                float(metrics["loss"])
                return state

        seconds = []
        for i in range(WARMUP + steps + 1):
            last = i == WARMUP + steps
            before = reset_peak(device) if last else 0
            began = time.perf_counter()
            state = advance(state)
            if last:
                memory = peak(device) - before
            elif i >= WARMUP:
                seconds.append(time.perf_counter() - began)
    print("\n" + json.dumps({"seconds": seconds, "memory": memory, "params": num_params(recipe.model)}))


def run_contest(kind: str, path: Path, members: int, steps: int) -> dict[str, Any]:
    script = [sys.executable, str(Path(__file__).resolve()), "contest", kind, str(path), f"{members}", f"{steps}"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{kind} failed: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(
    members: int = 8,
    steps: int = 300,
    seq_len: int = 64,
    batch: int = 8,
    width: int = 128,
    vocab_size: int = 2048,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    compile: Literal["off", "model"] = "model",
    repeats: int = 3,
    timed: int = 40,
    parts: tuple[Literal["launch", "step"], ...] = ("launch", "step"),
) -> None:
    """Print a table of the parts."""
    median = statistics.median
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write_recipe(folder, steps, seq_len, batch, width, vocab_size, dtype, compile)
        print(
            f"| {members} members, {batch} × {seq_len} tokens a step, {dtype} | together | one after another | ratio |"
        )
        print("|---|---|---|---|")
        if "launch" in parts:
            sweeps, runs = map(median, launch(folder, path, members, repeats))
            print(f"| launch to picture, {steps} steps [s] | {sweeps:.1f} | {runs:.1f} | {runs / sweeps:.2f} |")
        if "step" in parts:
            found: dict[str, list[dict[str, Any]]] = {"together": [], "solo": []}
            for _ in range(repeats):
                for kind, results in found.items():
                    results.append(run_contest(kind, path, members, timed))
            ours, solo = (1000 * median(median(one["seconds"]) for one in found[kind]) for kind in found)
            print(f"| a step of each [ms] | {ours:.1f} | {solo * members:.1f} | {solo * members / ours:.2f} |")
            state = members * 12 * found["solo"][0]["params"] / 2**20
            peaks = [median(one["memory"] for one in found[kind]) / 2**20 for kind in found]
            total, due = state + peaks[0], state + members * peaks[1]
            print(f"| memory: state and a step's peak [MiB] | {total:.1f} | {due:.1f} | {total / due:.2f} |")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["contest"]:
        contest(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        from modalities import cli

        cli.run(lambda argv: cli.call(main, argv, prog="benchmarks/sweep.py"))
