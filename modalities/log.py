"""What a run tells: the console, `metrics.jsonl`, TensorBoard, Weights & Biases, `loss.png`, `environment.json`.

On a GPU metrics are read one step late, so that logging never waits for the step that was just started.
"""

import contextlib
import datetime
import hashlib
import itertools
import json
import math
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where and how often a run is described."""

    every: int = 10
    """Steps between two lines."""
    dir: str = "runs"
    """Folder of the runs; this one lies in it under its name."""
    tensorboard: bool = True
    """Write TensorBoard events to `tb/`."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Log to Weights & Biases; offline needs no account."""
    wandb_project: str = "modalities"
    """Project there."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"log.every is {self.every}, but must be at least 1 step")


@dataclass
class Progress:
    """What turns a step into tokens, rates and a time of arrival."""

    total_steps: int
    global_batch: int
    seq_len: int
    flops_per_token: int
    peak_flops: float | None
    """Of all devices together; None where it is not asked for."""
    asynchronous: bool
    """Whether the device computes while the host goes on: then metrics are read one step late."""
    gauges: Callable[[], dict[str, float]] = dict
    """Read for each line: `peak_memory` of this rank [bytes], `compile_s` that the run spent in torch.compile [s]."""

    samples_after: Callable[[int], int] | None = None
    """Sequences that so many steps consume, where the global batch changes in a run."""

    def tokens_between(self, first: int, last: int) -> int:
        """Tokens of the steps after step `first` up to `last`."""
        if self.samples_after is None:
            return (last - first) * self.global_batch * self.seq_len
        return (self.samples_after(last) - self.samples_after(first)) * self.seq_len

    def rates(self, tokens: int, seconds: float) -> dict[str, float]:
        """Tokens per second and, where the peak is known, the share of it that the model's own FLOPs make.

        That is model FLOPs utilisation (MFU) after Chowdhery et al., PaLM, arXiv 2204.02311, appendix B: the tokens per
        second over those that the peak would do at `flops_per_token`, with nothing counted that is computed twice.
        """
        tokens_per_s = tokens / seconds
        rates = {"tokens_per_s": tokens_per_s}
        if self.peak_flops:
            rates["mfu"] = tokens_per_s * self.flops_per_token / self.peak_flops
        return rates


TAGS = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens_per_s": "perf/tokens_per_s",
    "mfu": "perf/mfu",
    "skipped": "train/skipped",
    "noise_scale": "train/noise_scale",
    "peak_memory": "perf/peak_memory",
    "compile_s": "perf/compile_s",
}


VALIDATED = ("val/", "val_ema/")
"""Begin the names of losses on validation sets: of the weights, and of their running mean."""


class Log:
    """The writers of a run. Ranks other than the main one have one with `folder=None`, which writes nothing."""

    def __init__(
        self, folder: Path | None, config: LogConfig, progress: Progress, recipe: dict[str, Any], step: int = 0
    ) -> None:
        """`step`: where the run goes on; what an earlier start wrote of later steps is outdated."""
        self.folder, self.config, self.progress = folder, config, progress
        self.pending: tuple[int, int, dict[str, Tensor | float]] | None = None
        self.opened = time.perf_counter()
        self.timed_from: tuple[int, float] | None = None
        self.board = self.wandb = None
        if folder is None:
            return
        (folder / "metrics.jsonl").touch()
        if not ends_with_newline(folder / "metrics.jsonl"):
            self.append("metrics.jsonl", "\n")  # a killed run broke off within a line
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(folder / "tb", purge_step=step + 1 if step else None)
        if config.wandb != "off":
            self.wandb = start_wandb(folder, config, recipe)

    def say(self, text: str) -> None:
        if self.folder is not None:
            print(text, flush=True)

    def start_clock(self, step: int) -> None:
        """Tokens per second count from here, at the end of step `step`."""
        self.timed_from = step, time.perf_counter()

    def train(self, step: int, samples: int, metrics: dict[str, Tensor | float]) -> None:
        """Take the metrics of the step that was just started, and write those of the one before it."""
        self.flush()
        first = self.timed_from is None
        if first or step % self.config.every == 0 or step == self.progress.total_steps:
            self.pending = step, samples, metrics
        if not self.progress.asynchronous:
            self.flush()

    @contextlib.contextmanager
    def aside(self, step: int) -> Iterator[None]:
        """Work that is not training: what is pending is written first, and the time does not count as training."""
        self.flush()
        yield
        self.start_clock(step)

    def flush(self) -> None:
        if self.pending is None:
            return
        (step, samples, metrics), self.pending = self.pending, None
        values = {key: float(value) for key, value in metrics.items()}  # waits for that step on the device
        # A source that had no target in this step has no loss, and what is drowned in noise no noise scale.
        values = {
            key: value
            for key, value in values.items()
            if not (key.startswith(("loss/", "noise_scale")) and math.isnan(value))
        }
        if not values.get("skipped", 1):
            del values["skipped"]
        gauges = self.progress.gauges()
        total = self.progress.total_steps
        if self.timed_from is None:  # the first step compiles and warms up; its rate would mislead
            compiling = gauges.get("compile_s")
            pace = f"  after {time.perf_counter() - self.opened:.1f} s"
            pace += f", {compiling:.1f} s of it compiling" if compiling else ""
        else:
            values |= self.progress.rates(
                self.progress.tokens_between(self.timed_from[0], step), time.perf_counter() - self.timed_from[1]
            )
            eta = self.progress.tokens_between(step, total) / values["tokens_per_s"]
            mfu = f"  mfu {values['mfu']:.1%}" if "mfu" in values else ""
            pace = f"  {values['tokens_per_s']:>9,.0f} tokens/s{mfu}  eta {datetime.timedelta(seconds=round(eta))}"
        self.start_clock(step)
        self.write(step, samples, values | gauges)
        memory = f"  {gauges['peak_memory'] / 2**30:.2f} GiB" if "peak_memory" in gauges else ""
        skipped = f"  skipped {values['skipped']:.0f}" if "skipped" in values else ""
        self.say(
            f"step {step:>{len(str(total))}}/{total}  loss {values['loss']:.4f}  lr {values['lr']:.2e}"
            f"  |grad| {values['grad_norm']:.3f}{skipped}{memory}{pace}"
        )

    def changes(self, step: int, samples: int, changes: Sequence[str]) -> None:
        """Write what a continued run has other than up to here."""
        line = {"step": step, "samples": samples, "changes": list(changes), "time": time.time()}
        self.append("metrics.jsonl", json.dumps(line) + "\n")
        self.say(f"changed from step {step} on: the run was begun with {'; '.join(changes)}")

    def val(
        self,
        step: int,
        samples: int,
        losses: Mapping[str, Tensor | float],
        of_ema: Mapping[str, Tensor | float] | None = None,
    ) -> None:
        """Write the loss of each validation set by its name [nats per token]; `of_ema`: those of the mean weights."""
        for name, loss in losses.items():
            values, words = {f"val/{name}/loss": float(loss)}, in_words(float(loss))
            if of_ema:
                values[f"val_ema/{name}/loss"] = float(of_ema[name])
                words += f"; EMA {in_words(float(of_ema[name]))}"
            self.write(step, samples, values)
            self.say(f"step {step}: val/{name} {words}")

    def sample(self, step: int, prompt: str, text: str | None) -> None:
        if self.folder is None or text is None:
            return
        self.append("samples.jsonl", json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n")
        self.say(f"step {step}: sample\n" + "\n".join(f"    | {line}" for line in (prompt + text).splitlines()))
        if self.board is not None:
            self.board.add_text("sample", f"```\n{prompt}{text}\n```", step)

    def write(self, step: int, samples: int, values: dict[str, float]) -> None:
        if self.folder is None:
            return
        tokens = samples * self.progress.seq_len
        # JSON has no NaN and no infinity: a diverged run's values are null.
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        line = {"step": step, "samples": samples, "tokens": tokens, **finite, "time": time.time()}
        self.append("metrics.jsonl", json.dumps(line) + "\n")
        tagged = {TAGS.get(key, f"train/{key}" if key[:5] == "loss/" else key): v for key, v in values.items()}
        if self.board is not None:
            for tag, value in tagged.items():
                self.board.add_scalar(tag, value, step)
        if self.wandb is not None:
            self.wandb.log(tagged, step=step)

    def append(self, name: str, text: str) -> None:
        """Add `text` to a file of the run; a ValueError where it cannot be, for a run without a log is blind."""
        if self.folder is None:
            return
        path = self.folder / name
        try:
            with path.open("a") as file:
                file.write(text)
        except OSError as error:
            raise ValueError(
                f"{path} cannot be written ({error.strerror}); make room, and the same command continues from the "
                "newest checkpoint"
            ) from None

    def close(self) -> None:
        self.flush()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def in_words(loss: float) -> str:
    return f"loss {loss:.4f}, perplexity {math.exp(loss) if loss < 50 else math.inf:,.2f}"


def start_wandb(folder: Path, config: LogConfig, recipe: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise ImportError("log.wandb needs the package wandb: pip install 'modalities[wandb]'") from None
    # One W&B run for all starts of this run.
    file = folder / "wandb_id"
    if not file.exists():
        file.write_text(secrets.token_hex(4))
    try:
        return wandb.init(
            project=config.wandb_project,
            name=folder.name,
            dir=folder,
            mode="online" if config.wandb == "online" else "offline",
            config=recipe,
            id=file.read_text(),
            resume="allow",
        )
    except wandb.Error as error:
        raise ValueError(f"log.wandb: {error}; log.wandb offline needs neither account nor network") from None


def environment() -> dict[str, Any]:
    """What a run ran on, for `environment.json`: code, packages, machine, command line."""
    diff = _git("diff", "HEAD")
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
    }


def _git(*args: str) -> str | None:
    """What git says of the checkout that this file lies in; None where there is no git or no checkout."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", *args], cwd=here, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode(errors="replace").strip()


def ends_with_newline(path: Path) -> bool:
    """Whether a text file is empty or its last line is whole."""
    with path.open("rb") as file:
        return file.seek(0, 2) == 0 or (file.seek(-1, 2) >= 0 and file.read(1) == b"\n")


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl` in the order of steps; of a step that was run again, the later word."""
    latest: dict[tuple[int, frozenset[str]], dict[str, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:  # a killed run broke off within it; the step was run again
            continue
        kind = frozenset(key for key in values if key == "loss" or key.startswith(VALIDATED))
        latest[values["step"], kind] = values
    return sorted(latest.values(), key=lambda values: values["step"])


def sparkline(values: list[float], width: int = 60) -> str:
    """A curve in one line of text, each character the mean of its share of `values`."""
    edges = [i * len(values) // min(width, len(values)) for i in range(min(width, len(values)) + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / span)] for mean in means)


def plot(folder: Path, title: str) -> Path:
    """Draw the loss curves of a run to `loss.png` in its folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(folder)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for key in ["loss", *sorted({key for line in lines for key in line if key.startswith(VALIDATED)})]:
        points = [(line["tokens"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            kind, *rest = key.split("/")
            name, style = ("training", "-") if kind == "loss" else (f"validation ({rest[0]})", "o-")
            name, style = (f"{name}, EMA", "o--") if kind == "val_ema" else (name, style)
            label = f"{name}, last {points[-1][1]:.2f}"
            axes.plot(*zip(*points, strict=True), style, linewidth=1.5, markersize=4, label=label)
    axes.set(title=title, xlabel="training tokens", ylabel="loss [nats per token]")
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = folder / "loss.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
