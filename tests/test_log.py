"""What a run writes of itself, and when."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from modalities.log import Log, LogConfig, Progress, environment, plot, read_metrics, sparkline

ROOT = Path(__file__).parents[1]
PLAIN = LogConfig(every=1, tensorboard=False)


def progress(total_steps: int = 20, peak_flops: float | None = None, asynchronous: bool = True) -> Progress:
    return Progress(
        total_steps=total_steps,
        global_batch=4,
        seq_len=16,
        flops_per_token=1000,
        peak_flops=peak_flops,
        asynchronous=asynchronous,
    )


def metrics(loss: float) -> dict[str, torch.Tensor | float]:
    return {"loss": torch.tensor(loss), "lr": 1e-3, "grad_norm": torch.tensor(0.5)}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_has_the_keys_of_the_design(tmp_path: Path) -> None:
    log = Log(tmp_path, PLAIN, progress(peak_flops=1e6), {})
    log.start_clock(0)
    before = time.time()
    log.train(1, 4, metrics(2.5))
    log.val(1, 4, {"val": 3.5})
    log.close()
    train, val = lines(tmp_path)[-1], lines(tmp_path)[0]
    assert list(train) == ["step", "samples", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "time"]
    assert [train[key] for key in list(train)[:6]] == [1, 4, 64, 2.5, 1e-3, 0.5]
    assert train["mfu"] == pytest.approx(train["tokens_per_s"] * 1000 / 1e6)
    assert before <= train["time"] <= time.time()
    assert list(val) == ["step", "samples", "tokens", "val/val/loss", "time"] and val["val/val/loss"] == 3.5


def test_a_line_tells_memory_and_the_seconds_of_compiling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter((1.5, 1.5))
    gauged = replace(progress(), gauges=lambda: {"peak_memory": 3 * 2**30, "compile_s": next(seconds)})
    log = Log(tmp_path, PLAIN, gauged, {})
    for step in (1, 2):
        log.train(step, 4 * step, metrics(1.0))
    log.close()
    assert [(line["peak_memory"], line["compile_s"]) for line in lines(tmp_path)] == [(3 * 2**30, 1.5)] * 2
    first, second = capsys.readouterr().out.splitlines()
    assert "3.00 GiB" in first and ", 1.5 s of it compiling" in first
    assert "3.00 GiB" in second and "compiling" not in second


def test_metrics_are_read_one_step_late(tmp_path: Path) -> None:
    log = Log(tmp_path, PLAIN, progress(), {})
    first, second = metrics(1.0), metrics(2.0)
    log.train(1, 4, first)
    assert lines(tmp_path) == []
    # What the device computes until the next step is started still counts: nothing was read before.
    torch.as_tensor(first["loss"]).fill_(1.5)
    log.train(2, 8, second)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.5)]
    torch.as_tensor(second["loss"]).fill_(2.5)
    log.flush()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.5), (2, 2.5)]
    log.flush()
    log.close()
    assert len(lines(tmp_path)) == 2


def test_metrics_of_a_cpu_are_read_at_once(tmp_path: Path) -> None:
    log = Log(tmp_path, PLAIN, progress(asynchronous=False), {})
    for step in (1, 2):
        log.train(step, 4 * step, metrics(1.0))
        assert [line["step"] for line in lines(tmp_path)] == list(range(1, step + 1))
    log.close()


def test_the_first_the_last_and_every_nth_step_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(tmp_path, LogConfig(every=5, tensorboard=False), progress(total_steps=12), {})
    for step in range(1, 13):
        log.train(step, 4 * step, metrics(float(step)))
    log.close()
    assert [(line["step"], line["samples"], line["tokens"]) for line in lines(tmp_path)] == [
        (step, 4 * step, 64 * step) for step in (1, 5, 10, 12)
    ]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed] == [["step", f"{step}/12"] for step in (1, 5, 10, 12)]
    assert "loss 10.0000" in printed[2] and "tokens/s" in printed[2] and "eta 0:00:0" in printed[2]


def test_the_rate_counts_all_steps_since_the_last_line_and_not_the_time_aside(tmp_path: Path) -> None:
    log = Log(tmp_path, LogConfig(every=2, tensorboard=False), progress(), {})
    log.train(1, 4, metrics(1.0))
    log.train(2, 8, metrics(1.0))  # step 1 is known to be done here, and the clock starts
    start = time.perf_counter()
    time.sleep(0.05)
    for step in (3, 4):
        log.train(step, 4 * step, metrics(1.0))
    with log.aside(4):
        longest = time.perf_counter() - start
        time.sleep(0.5)
    after = time.perf_counter()
    log.train(6, 24, metrics(1.0))
    log.flush()
    last = time.perf_counter() - after
    log.close()
    rates = {line["step"]: line.get("tokens_per_s", 0.0) for line in lines(tmp_path)}
    assert rates[1] == 0, "the first step compiles and warms up"
    assert 64 / (longest + 0.25) < rates[2] < 64 / 0.05
    assert rates[6] > 128 / (last + 0.25)


def test_tensorboard_has_the_tags_of_the_design(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(tmp_path, LogConfig(every=1), progress(peak_flops=1e6), {})
    log.start_clock(0)
    for step in (1, 2, 3):
        log.train(step, 4 * step, metrics(1.0 / step))
    log.val(3, 12, {"val": 3.5})
    log.sample(3, "def ", "f(x):\n    return x")
    log.close()
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    tags = {"train/loss", "train/lr", "train/grad_norm", "perf/tokens_per_s", "perf/mfu", "val/val/loss"}
    assert set(events.Tags()["scalars"]) == tags
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (step, pytest.approx(1.0 / step)) for step in (1, 2, 3)
    ]
    assert [(event.step, event.value) for event in events.Scalars("val/val/loss")] == [(3, 3.5)]


WANDB_RUN = """
import sys
from pathlib import Path
import torch
from modalities.log import Log, LogConfig, Progress
config = LogConfig(every=1, tensorboard=False, wandb="offline", wandb_project="tests")
progress = Progress(
    total_steps=2, global_batch=4, seq_len=16, flops_per_token=1000, peak_flops=None, asynchronous=False
)
log = Log(Path(sys.argv[1]), config, progress, {"steps": 2, "model": {"width": 48}})
for step in (1, 2):
    log.train(step, 4 * step, {"loss": torch.tensor(2.0), "lr": 1e-3, "grad_norm": torch.tensor(0.5)})
log.val(2, 8, {"val": 3.5})
log.close()
"""


def test_wandb_offline_needs_neither_account_nor_network(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    folder, home = tmp_path / "run", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-c", WANDB_RUN, str(folder)],
        cwd=ROOT,
        env={**kept, **nowhere, "HOME": str(home)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "wandb").glob("offline-run-*")
    (record,) = run.glob("*.wandb")
    content = record.read_bytes()
    for part in (b"train/loss", b"train/lr", b"train/grad_norm", b"val/val/loss", b"width"):
        assert part in content
    assert len(lines(folder)) == 3


def test_ranks_without_a_folder_write_and_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    log = Log(None, LogConfig(every=1, wandb="offline"), progress(), {})
    log.start_clock(0)
    for step in (1, 2):
        log.train(step, 4 * step, metrics(1.0))
    with log.aside(2):
        log.val(2, 8, {"val": 3.5})
        log.sample(2, "def ", "f")
        log.say("hello")
    log.close()
    assert os.listdir(tmp_path) == []
    assert capsys.readouterr() == ("", "")


def test_a_run_that_continues_adds_to_its_files(tmp_path: Path) -> None:
    for steps in ((1, 2, 3), (3, 4)):
        log = Log(tmp_path, PLAIN, progress(), {})
        for step in steps:
            log.train(step, 4 * step, metrics(10.0 * len(steps) + step))
        log.val(3, 12, {"val": float(len(steps))})
        log.sample(3, "def ", 'f(x):\n    "…"')
        log.close()
    assert len(lines(tmp_path)) == 7
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert samples == [{"step": 3, "prompt": "def ", "text": 'f(x):\n    "…"'}] * 2
    latest = read_metrics(tmp_path)
    assert [(line["step"], line["loss"]) for line in latest if "loss" in line] == [(1, 31), (2, 32), (3, 23), (4, 24)]
    assert [line["val/val/loss"] for line in latest if "val/val/loss" in line] == [2]
    assert [line["step"] for line in latest] == sorted(line["step"] for line in latest)


def test_plot_draws_a_png(tmp_path: Path) -> None:
    log = Log(tmp_path, PLAIN, progress(), {})
    for step in range(1, 21):
        log.train(step, 4 * step, metrics(9 / step))
    log.flush()
    for step in (10, 20):
        log.val(step, 4 * step, {"val": 9 / step})
    log.close()
    path = plot(tmp_path, "a run")
    content = path.read_bytes()
    assert path == tmp_path / "loss.png"
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 10_000
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert width >= 1000 and height >= 500
    first = content
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 21, "samples": 84, "tokens": 1344, "loss": 30.0}) + "\n")
    assert plot(tmp_path, "a run").read_bytes() != first


def test_a_run_that_diverges_is_described_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = Log(tmp_path, PLAIN, progress(), {})
    for step, loss in enumerate((9.0, float("inf"), float("nan")), start=1):
        log.train(step, 4 * step, metrics(loss))
        with log.aside(step):
            log.val(step, 4 * step, {"val": loss})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 1, 2, 2, 3, 3]
    assert plot(tmp_path, "a run").is_file()
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) < 200


def test_a_loss_that_is_not_a_number_is_still_json(tmp_path: Path) -> None:
    log = Log(tmp_path, PLAIN, progress(), {})
    log.train(1, 4, metrics(float("nan")))
    log.close()

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is Python's alone: other readers of JSON stop there")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["step"] == 1


def test_environment_tells_what_a_run_ran_on() -> None:
    found = environment()
    assert set(found) >= {
        "time",
        "command",
        "git_commit",
        "git_diff_sha256",
        "python",
        "torch",
        "cuda",
        "device",
    }
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__ and found["command"] == sys.argv
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        assert found["git_commit"] == (head.stdout.strip() if head.returncode == 0 else None)


def test_an_impossible_interval_is_named() -> None:
    with pytest.raises(ValueError, match="log.every is 0"):
        LogConfig(every=0)


def test_a_broken_last_line_is_passed_over_and_ended(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    log = Log(tmp_path, LogConfig(tensorboard=False), progress(), {}, step=1)
    log.train(2, 8, metrics(1.5))
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 2.0), (2, 1.5)]


def test_sparkline_falls_with_the_loss() -> None:
    assert sparkline([8.0, 6.0, 4.0, 1.0]) == "█▆▄▁"
    assert sparkline([float(i) for i in range(1000)], width=8) == "▁▂▃▄▅▆▇█"
    assert sparkline([3.0]) == "▁"


def test_each_source_has_a_curve_where_it_has_targets(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(tmp_path, LogConfig(every=1), progress(), {})
    for step, chat in ((1, 3.0), (2, float("nan")), (3, 2.0)):
        means = torch.tensor([1.0, chat])
        log.train(step, 4 * step, {**metrics(2.0), "loss/web": means[0], "loss/chat": means[1]})
    log.close()
    assert [line.get("loss/chat", "left out") for line in lines(tmp_path)] == [3.0, "left out", 2.0]
    assert [line["loss/web"] for line in lines(tmp_path)] == [1.0] * 3
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [event.step for event in events.Scalars("train/loss/chat")] == [1, 3]
    assert [event.step for event in events.Scalars("train/loss/web")] == [1, 2, 3]
