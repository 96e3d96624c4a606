"""A student with a teacher and the same student without, at equal steps: the validation loss of each, and its time.

    python prep.py demo && python train.py --recipe demo
    python benchmarks/distill.py [--seeds 0 1] [--kinds alone forward reverse notes] [--steps 300]

Each contestant is `train.py --recipe distill_demo` in a process of its own, one after another. `notes` learns from the
teacher's 32 likeliest words, written down before. Runs and the notes lie in a temporary folder, or in --out.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[1]
Kind = Literal["alone", "forward", "reverse", "notes"]


def train(recipe: str, out: Path, name: str, flags: list[str]) -> tuple[float, float]:
    """(validation loss at the end, median tokens/s) of a run of the recipe, in a process of its own."""
    run([sys.executable, f"{ROOT}/train.py", "--recipe", recipe, "--name", name, "--log.dir", f"{out}", *flags])
    lines = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    losses = [value for line in lines for key, value in line.items() if key.startswith("val/")]
    speeds = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]
    return losses[-1], statistics.median(speeds)


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{ROOT}"})
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")


def main(
    *,
    recipe: str = "distill_demo",
    steps: int | None = None,
    teacher: str = "runs/demo",
    data: str = "data/demo/train.pbin",
    seeds: tuple[int, ...] = (0, 1),
    kinds: tuple[Kind, ...] = ("alone", "forward"),
    out: Path | None = None,
) -> None:
    """Print the table.

    Args:
        recipe: Of the student.
        steps: Of training; None: the recipe's.
        teacher: The run of the recipe demo.
        data: What the students are trained on, for the notes.
        seeds: Of the initial weights and the data's order.
        kinds: Which to run; the first is what the others are compared with.
        out: Folder for the runs, kept; None: a temporary one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch)
        of_kind: dict[str, list[str]] = {
            "alone": ["--distill.teacher", ""],
            "forward": ["--distill.teacher", teacher],
            "reverse": ["--distill.teacher", teacher, "--distill.kind", "reverse"],
            "notes": ["--distill.teacher", "", "--distill.teacher-topk", str(folder / "demo.topk")],
        }
        if "notes" in kinds:
            out_of = ["--data", data, "--save-topk", str(folder / "demo.topk")]
            run([sys.executable, "-m", "modalities.evaluate", teacher, *out_of])
        print(f"| student | {' | '.join(f'loss, seed {seed}' for seed in seeds)} | mean | less by | tokens/s |")
        print("|---|" + "---|" * (len(seeds) + 3))
        base = 0.0
        for kind in kinds:
            length = [] if steps is None else ["--steps", f"{steps}"]
            flags = [["--seed", f"{seed}", *of_kind[kind], *length] for seed in seeds]
            found = [train(recipe, folder, f"{kind}-{seed}", given) for seed, given in zip(seeds, flags, strict=True)]
            mean, speed = statistics.mean(loss for loss, _ in found), statistics.median(speed for _, speed in found)
            base = base or mean
            losses = " | ".join(f"{loss:.4f}" for loss, _ in found)
            print(f"| {kind} | {losses} | {mean:.4f} | {base - mean:.4f} | {speed:,.0f} |", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from modalities import cli

    cli.run(lambda args: cli.call(main, args))
