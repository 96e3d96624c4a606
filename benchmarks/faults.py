"""Whatever is killed, filled, flipped or hung: does the run go on to the same weights, or stop with one line?

    python benchmarks/faults.py [--quick] [--rows kills saves …] [--seed 0] [--write]

Each row is a fault, done to real training on real ranks (gloo, a tiny model) by real signals, limits and damage; the
table says how often it was tried, how often the promise held, and what was measured. Exit status 1 if any did not hold.
"""

import argparse
import functools
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
# The store is rank 0's here, and torchrun's agent's elsewhere: only here does torch's C++ have much to say of its end.
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"

import torch

from benchmarks import victims
from benchmarks.damage import flips, full_disks, malice
from benchmarks.victims import (
    ROOT,
    Ranks,
    Result,
    Trial,
    bad_number,
    checkpoint_at,
    command,
    die_at,
    edited,
    losses,
    newest,
    order_of,
    recording,
    same,
    step_of,
    steps_logged,
    trained,
)
from modalities import ranks
from modalities.folder import LOCK

# ------------------------------------------------------------------------------------------------------------- recovery


def kills(trial: Trial) -> Result:
    """SIGKILL of a random rank at a random moment of one run under modalities.run."""
    count, steps = (1, 60) if trial.quick else (25, 800)
    flags = ("--checkpoint.every", 5, "--eval.every", 50, "--checkpoint.keep-last", 3)
    trained(trial.folder, 2, command("undisturbed", steps, *flags))
    supervise = [sys.executable, "-m", "modalities.run", "--nproc-per-node", "2", "--back-off", "0.1"]
    killed, token, run = 0, f"{os.getpid()}-{time.time_ns()}", trial.run("killed")
    environment = {**os.environ, "FAULTS": token, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (trial.folder / "killed.err").open("w") as err:
        supervisor = subprocess.Popen(
            [*supervise, str(ROOT / "train.py"), *command("killed", steps, *flags)],
            cwd=trial.folder, env=environment, stdout=subprocess.DEVNULL, stderr=err, preexec_fn=ranks.die_with_parent,
        )  # fmt: skip
    waits: list[float] = []
    workers: dict[int, int] = {}
    died = time.monotonic()
    for i in range(count + 1):
        workers = wait_for(functools.partial(both, token, {*workers.values()}), supervisor) or {}
        if workers and 0 < i < count and trial.random.random() < 0.3:
            time.sleep(trial.random.uniform(0, statistics.mean(waits)))  # while it starts
        else:
            lines = count_lines(run)
            if not wait_for(functools.partial(has_lines, run, lines), supervisor):
                break
            waits.append(time.monotonic() - died)
            if i == count:
                break
            wait_for(functools.partial(has_lines, run, lines + trial.random.randint(1, 25)), supervisor)
            time.sleep(trial.random.uniform(0, 0.05))
        os.kill(workers[trial.random.randrange(2)], signal.SIGKILL)
        killed, died = killed + 1, time.monotonic()
    status = supervisor.wait(600)
    equal = status == 0 and same(checkpoint_at(run, steps), checkpoint_at(trial.run("undisturbed"), steps))
    if not equal:
        print(f"modalities.run ended with {status}:\n{(trial.folder / 'killed.err').read_text()}", file=sys.stderr)
    recovered = waits[1:]
    mean = f"{statistics.mean(recovered):.1f} s" if recovered else "never"
    recover = f"{mean} from a kill to the next step (mean of {len(recovered)})"
    return Result(count, killed if equal else 0, f"final weights {'' if equal else 'NOT '}bitwise equal; {recover}")


def workers_of(token: str) -> dict[int, int]:
    """Process by rank, of those whose environment has the token."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            values = dict(item.split("=", 1) for item in (folder / "environ").read_text().split("\0") if "=" in item)
        except OSError:  # it has just ended
            continue
        if values.get("FAULTS") == token and "RANK" in values:
            found[int(values["RANK"])] = int(folder.name)
    return found


def both(token: str, before: set[int]) -> dict[int, int] | None:
    """The two workers, once none of those before is left."""
    workers = workers_of(token)
    return workers if len(workers) == 2 and not before & set(workers.values()) else None


def has_lines(run: Path, more_than: int) -> bool:
    return count_lines(run) > more_than


def wait_for(condition: Callable[[], Any], process: subprocess.Popen, seconds: float = 120) -> Any:
    """What `condition` gives when it gives something; None if the process ends, or the time."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.005)
    return None


def count_lines(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def saves(trial: Trial) -> Result:
    """SIGKILL before each operation of a save and of the deletion after it: each rank, in the background and not."""
    straight = trial.straight()
    tried = passed = 0
    details = []
    for kind in ("background", "no-background"):
        args = command("torn", 6, "--checkpoint.every", 2, f"--checkpoint.{kind}", "--checkpoint.keep-last", 1)
        for victim in (0, 1):
            operations = trial.folder / "operations"
            trial.begun("torn", straight.name, 2)
            trained(trial.folder, 2, args, die_at(0, victim, operations))
            total = len(operations.read_text().splitlines())
            details.append(f"{total} of rank {victim} {kind}")
            numbers = trial.random.sample(range(1, total + 1), 2 - victim if trial.quick else total)
            for number in numbers:
                run = trial.begun("torn", straight.name, 2)
                torn = Ranks(trial.folder, 2, args, die_at(number, victim, operations))
                torn.wait_for_one()
                tried, passed = tried + 1, passed + survives(trial, torn, run, straight, args)
    return Result(tried, passed, f"operations: {', '.join(details)}; resumed from the newest durable one")


def survives(trial: Trial, torn: Ranks, run: Path, straight: Path, args: list[str]) -> bool:
    """Whether what a kill left is a valid state of its step, no older than what was said, and leads to the end."""
    left = newest(run)
    said = max([2, *(int(line.split()[1][:-1]) for line in torn.out().splitlines() if ": saved " in line)])
    durable = left is not None and step_of(left) >= said and same(left, checkpoint_at(straight, step_of(left)))
    if not trial.holds(-signal.SIGKILL in torn.statuses.values() and durable, torn):
        return False
    resumed = trained(trial.folder, 2, args)
    return trial.holds(same(checkpoint_at(run, 6), checkpoint_at(straight, 6)), resumed)


def retention(trial: Trial) -> Result:
    """Five saves in a row are killed in the middle, with keep_last 1; then one succeeds."""
    straight = trial.straight()
    run = trial.begun("kept", straight.name, 2)
    args = command("kept", 6, "--checkpoint.every", 2, "--checkpoint.keep-last", 1)
    passed = 0
    for _ in range(5):
        number = trial.random.randint(2, 6)  # the files of the first save
        Ranks(trial.folder, 2, args, die_at(number, 0, trial.folder / "operations")).wait_for_one()
        passed += newest(run) == checkpoint_at(run, 2)
    trained(trial.folder, 2, args)
    left = sorted(path.name for path in run.glob("step-*"))
    passed += left == ["step-00000006"] and same(checkpoint_at(run, 6), checkpoint_at(straight, 6))
    return Result(6, passed, f"after them {', '.join(left)} is there")


# -------------------------------------------------------------------------------------------------------------- signals


def stops(trial: Trial) -> Result:
    """SIGTERM to one rank in a step, an evaluation, a save, a start-up and while compiling."""
    phases = ["step", "save"] if trial.quick else ["step", "evaluation", "save", "start-up", "compile"] * 2
    flags: tuple[object, ...] = ("--checkpoint.every", 7, "--eval.every", 5, "--eval.samples", 0)
    flags += ("--parallel.micro-batch", 1)
    if "compile" in phases:
        flags += ("--parallel.compile", "block")
    steps = 30 if trial.quick else 60
    trained(trial.folder, 2, command("never-stopped", steps, *flags))
    passed, late = 0, list[int]()
    args, run = command("stopped", steps, *flags), trial.run("stopped")
    for phase in phases:
        before = steps_logged(run)
        cache = str(trial.folder / f"compiled-{len(late)}")

        def compiles(rank: int, cache: str = cache) -> None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # an empty one, or there is nothing to compile

        stopped = Ranks(trial.folder, 2, args, compiles if phase == "compile" else None)
        stopped.until(functools.partial(has_come, phase, run, before, stopped))
        done = steps_logged(run)
        # Ranks that have not met cannot agree; torchrun, stopped, tells all of them.
        for rank in (0, 1) if phase == "start-up" else (trial.random.randrange(2),):
            stopped.kill(rank, signal.SIGTERM)
        statuses = stopped.wait()
        late.append(step_of(newest(run)) - done)
        # The step that the signal came in is done, and one more, at whose end all ranks know.
        told = "stopped by SIGTERM" in stopped.out()
        passed += trial.holds(statuses == [ranks.STOPPED] * 2 and late[-1] <= 2 and told, stopped)
    trained(trial.folder, 2, args)
    equal = same(checkpoint_at(run, steps), checkpoint_at(trial.run("never-stopped"), steps))
    detail = f"in {', '.join(phases)}: saved at most {max(late) - 1} step(s) after the one that it came in"
    return Result(len(phases), passed if equal else 0, f"{detail}; end {'' if equal else 'NOT '}bitwise equal")


def listens(pid: int) -> bool:
    """Whether a process has a handler of SIGTERM."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def has_come(phase: str, run: Path, before: int, stopped: Ranks) -> bool:
    """Whether the launch is in this phase."""
    if phase == "start-up":  # from where it listens; before, a signal ends a process as it ends any other
        return all(map(listens, stopped.pids))
    if phase == "compile":
        return "continuing" in stopped.out() or "starting" in stopped.out()
    logged = steps_logged(run)
    if phase == "save":
        return any(run.glob("step-*.tmp"))
    return logged > before and (phase == "step" or logged % 5 == 0)


def hangs(trial: Trial) -> Result:
    """SIGSTOP of a rank; the watchdog waits 5 s."""
    passed, waits = 0, []
    victims_of_it = (1,) if trial.quick else (0, 1)
    for victim in victims_of_it:
        run = trial.run(f"hung-{victim}")
        hung = Ranks(trial.folder, 2, command(run.name, 10**6, "--watchdog.timeout", 5, "--checkpoint.every", 100))
        hung.until(functools.partial(has_lines, run, 3))
        hung.kill(victim, signal.SIGSTOP)
        began = time.monotonic()
        statuses = hung.wait()
        waits.append(time.monotonic() - began)
        named = f"rank {victim}" in hung.err()
        passed += trial.holds(waits[-1] <= 5 + 10 and named and statuses[1 - victim] == ranks.HUNG, hung)
    return Result(len(victims_of_it), passed, f"all gone after {max(waits):.1f} s, the rank named")


# --------------------------------------------------------------------------------------------------------------- resume


def rank_counts(trial: Trial) -> Result:
    """A run that goes on with other numbers of ranks, twice; its order of sequences, and its losses."""
    ways = [(2, 1, 2)] if trial.quick else [(2, 2, 2), (2, 1, 2), (1, 4, 2)]
    passed, details = 0, []
    for way in ways:
        name = "-".join(map(str, way))
        # Dropout's random numbers are each rank's own.
        flags = () if len(set(way)) == 1 else ("--model.resid-dropout", "0")
        legs, pieces = [name, f"{name}b", f"{name}c"], []
        for leg, count, step in zip(legs, way, (0, 7, 14), strict=True):
            if step:
                trial.begun(leg, legs[legs.index(leg) - 1], step)
            trained(trial.folder, count, command(leg, 20, "--checkpoint.every", 7, *flags), recording(leg))
            pieces.append(order_of(trial.folder, leg))
        whole, *later = pieces
        joined = {k: v for k, v in whole.items() if k < min(later[0])}
        joined |= {k: v for k, v in later[0].items() if k < min(later[1])} | later[1]
        one, other = losses(trial.run(legs[0])), losses(trial.run(legs[2]))
        furthest = max(abs(a - b) / a for a, b in zip(one, other, strict=True))
        bitwise = same(checkpoint_at(trial.run(legs[0]), 20), checkpoint_at(trial.run(legs[2]), 20))
        passed += joined == whole and len(later[1]) == 6 and (bitwise if len(set(way)) == 1 else furthest <= 1e-5)
        details.append(f"{'→'.join(map(str, way))} {'bitwise' if bitwise else f'{furthest:.0e}'}")
    return Result(len(ways), passed, f"{', '.join(details)}; the same sequences in the same order")


def files_of(run: Path) -> dict[Path, bytes]:
    """All that a run's folder holds, but who has it at the time."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != LOCK}


def changes(trial: Trial) -> Result:
    """Data, mask, tokenizer or recipe changed under a resume."""
    straight = trial.straight()
    args = command("changed", 6, "--checkpoint.every", 2)
    flags = {"optim.lr": "0.02", "seed": "1", "data.weights": "1 1", "model.width": "64", "steps": "7"}
    cases = ["web.pbin", "chat.pbin", "chat_mask.pbin", "tokenizer.json", *flags]
    passed, count = 0, 1 if trial.quick else 2
    for case in cases:
        run = trial.begun("changed", straight.name, 4)
        before = files_of(run)
        path = trial.folder / (case if case not in flags else "web.pbin")
        with edited(path):
            if case not in flags:
                content = bytearray(path.read_bytes())
                content[13] ^= 1
                path.write_bytes(content)
            extra = [f"--{case}", *flags[case].split()] if case in flags else []
            refused = Ranks(trial.folder, count, args + extra)
            statuses = refused.wait()
        named = all(case in line for line in refused.err().splitlines() if line.startswith("error: "))
        untouched = before == files_of(run)
        promise = statuses == [1] * count and named and "error: " in refused.err() and untouched
        passed += trial.holds(promise, refused)
    return Result(len(cases), passed, f"refused by name: {', '.join(cases)}")


# -------------------------------------------------------------------------------------------------------------- numbers


def bad_numbers(trial: Trial) -> Result:
    """NaN or Inf in the loss or the gradient of one rank from step 3 on, where 3 such steps stop a run."""
    cases = [("nan", "loss"), ("inf", "gradient")]
    cases += [] if trial.quick else [("inf", "loss"), ("nan", "gradient")]
    passed = 0
    for kind, where in cases:
        run = trial.run(f"{kind}-{where}")
        args = command(run.name, 20, "--checkpoint.every", 1, "--guard.max-bad-steps", 3, "--data.ramp")
        stopped = Ranks(trial.folder, 2, args, bad_number(kind, where, 2, 1))
        statuses, saved = stopped.wait(), newest(run)
        params = victims.state_at(checkpoint_at(run, 2))
        later = {} if saved is None else victims.state_at(saved)
        untouched = all(torch.equal(params[name], later[name]) for name in params)
        promise = statuses == [1, 1] and step_of(saved) >= 3 and untouched and "rank 1" in stopped.err()
        passed += trial.holds(promise, stopped)
    return Result(len(cases), passed, "weights bitwise untouched, both ranks stop after 3, in one line")


ROWS: dict[str, tuple[str, Callable[[Trial], Result]]] = {
    "kills": ("SIGKILL of a random rank at a random moment", kills),
    "saves": ("SIGKILL at every operation of a save, each rank, sync and async", saves),
    "stops": ("SIGTERM", stops),
    "hangs": ("SIGSTOP of a rank", hangs),
    "full_disks": ("no space for the checkpoint, the log, the .pbin", full_disks),
    "flips": ("damaged files in a checkpoint", flips),
    "malice": ("malicious pickles", malice),
    "rank_counts": ("other numbers of ranks", rank_counts),
    "changes": ("data, tokenizer or recipe changed under a resume", changes),
    "bad_numbers": ("NaN or Inf on one rank", bad_numbers),
    "retention": ("retention after 5 torn saves", retention),
}


RESULTS, HEADING = ROOT / "benchmarks" / "RESULTS.md", "## Faults"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--quick", action="store_true", help="fewer of each; minutes on two cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="keep the rows in benchmarks/RESULTS.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    victims.load()
    os.environ["OMP_NUM_THREADS"] = "1"
    print("| fault | tried | passed | detail | s |\n|---|---|---|---|---|", flush=True)
    failed = False
    for name in args.rows:
        title, row = ROWS[name]
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="faults-") as folder:
            victims.prepare(Path(folder))
            result = row(Trial(Path(folder), args.quick, random.Random(args.seed)))
        failed |= result.passed != result.tried
        cells = (title, result.tried, result.passed, result.detail, f"{time.monotonic() - began:.0f}")
        line = f"| {' | '.join(map(str, cells))} |"
        print(line, flush=True)
        if args.write:
            keep(line, title)
    sys.exit(failed)


def keep(line: str, title: str) -> None:
    """Put a row in the place of that of the same fault in RESULTS.md, or under the others."""
    lines = RESULTS.read_text().splitlines()
    first = lines.index(HEADING)
    last = next((i for i in range(first + 1, len(lines)) if lines[i].startswith("## ")), len(lines))
    table = [i for i in range(first, last) if lines[i].startswith("|")]
    same = [i for i in table if lines[i].startswith(f"| {title} |")]
    lines[same[0] if same else table[-1] + 1 : same[0] + 1 if same else table[-1] + 1] = [line]
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
