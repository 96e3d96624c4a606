"""Tokens/s, share of the GPU's peak (MFU) and peak memory of the training step, for each of a grid of settings.

    python benchmarks/gpu.py [--models gpt2_124m --micro-batch 16 32 64 --compile-mode default max-autotune]
    python benchmarks/gpu.py --device cpu --tiny

Each setting has a process of its own; one that runs out of memory, or is refused, is a row. It needs torch and numpy
alone: the step is put together here as loop.build does it, on random tokens that lie on the device.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modalities.model import ModelConfig

ROOT = Path(__file__).parents[1]
MODELS = {"gpt2_60m": (512, (32, 128)), "gpt2_124m": (1024, (16, 64)), "llama_1b": (4096, (2, 8))}
"""seq_len, and the micro-batches that are tried unless others are given."""
WARMUP = 3
COMPILE = ("off", "block", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row. `compile`: off, block, or the mode in which the whole step is compiled."""

    model: str
    dtype: str
    attention: str
    compile: str
    micro_batch: int
    seq_len: int
    accumulate: int
    steps: int
    device: str
    tiny: bool


def model_of(setting: Setting) -> "ModelConfig":
    """The model of the recipe of that name; where `tiny`, the same with two narrow layers and few words."""
    from modalities import presets
    from modalities.model import ModelConfig
    from modalities.rope import RopeScaling

    if setting.model == "gpt2_60m":
        model = ModelConfig(vocab_size=50_257, num_layers=10, width=512, num_heads=8, mlp_width=1536, max_seq_len=512)
    elif setting.model == "gpt2_124m":
        model = presets.gpt2_124m()
    else:
        model = replace(presets.llama3_1b(), max_seq_len=4096, rope_scaling=RopeScaling())
    if setting.tiny:
        kv_heads = None if model.num_kv_heads is None else 2
        model = replace(
            model,
            vocab_size=512,
            num_layers=2,
            width=64,
            num_heads=4,
            num_kv_heads=kv_heads,
            head_dim=None,
            mlp_width=128,
        )
    return replace(model, attention=setting.attention)  # type: ignore[arg-type]


def contest(setting: Setting) -> None:
    """In a process of its own: prints seconds a step, FLOPs a token, bytes at the peak, and losses; or `failed`."""
    import torch

    try:
        print(f"\n{json.dumps(measure(setting))}")
    except torch.OutOfMemoryError:
        print(f"\n{json.dumps({'failed': 'out of memory'})}")
    except ValueError as error:
        print(f"\n{json.dumps({'failed': str(error)})}")


def measure(setting: Setting) -> dict[str, Any]:
    import torch

    from benchmarks.loss import peak, reset_peak
    from modalities import attention, dist, fsdp, optim, step
    from modalities.compiling import can_compile
    from modalities.model import build_skeleton, flops_per_token

    model = model_of(setting)
    whole = setting.compile not in ("off", "block")
    parallel = fsdp.ParallelConfig(
        micro_batch=setting.micro_batch,
        param_dtype=setting.dtype,  # type: ignore[arg-type]
        compile="model" if whole else setting.compile,  # type: ignore[arg-type]
        compile_mode=setting.compile if whole else "default",  # type: ignore[arg-type]
    )
    with dist.setup() as world:
        if world.device.type != setting.device:
            raise ValueError(f"the device is {world.device.type}, not {setting.device}; --device says which")
        attention.choose(model.attention, world.device)
        if parallel.compile != "off" and not can_compile(world.device):
            raise ValueError("torch.compile finds no C++ compiler (g++)")
        skeleton = build_skeleton(model)
        config = optim.OptimConfig()
        optimizer = optim.make(config, [name for name, _ in skeleton.named_parameters()])
        fsdp.parallelize(skeleton, world.mesh, parallel)
        params = fsdp.init_params(skeleton, 0, world.device)
        by_block = parallel.compiles_blocks(sharded=False)
        loss_fn = step.make_loss_fn(skeleton, parallel.compute_dtype, train=True, compile_head=by_block)
        grad_fn = step.grad_and_value(loss_fn, False, whole, parallel.compile_mode, by_autograd=by_block)
        train_step = step.make_train_step(grad_fn, optimizer, config.grad_clip, lambda _: config.lr, 0, world)
        state = step.TrainState(params, optimizer.init(params))
        shape = (2, setting.accumulate, setting.micro_batch, setting.seq_len)
        torch.manual_seed(0)
        inputs, targets = torch.randint(model.vocab_size, shape, device=world.device)
        batch = {"inputs": inputs, "targets": targets}
        losses, began = [], time.perf_counter()

        def one_step() -> None:
            nonlocal state
            state, metrics = train_step(state, batch)
            losses.append(metrics["loss"])

        one_step()
        first_loss, first = float(losses[0]), time.perf_counter() - began
        reset_peak(setting.device)
        seconds = clocked(one_step, setting.steps, setting.device)
        return {
            "seconds": seconds,
            "first": first,
            "memory": peak(setting.device),
            "flops_per_token": flops_per_token(model, setting.seq_len),
            "losses": [first_loss, float(losses[-1])],
        }


def clocked(one_step: Callable[[], None], steps: int, device: str) -> list[float]:
    """The seconds of each of `steps` steps after some that warm up; a GPU is never waited for between them."""
    import torch

    if device == "cpu":
        moments = []
        for _ in range(WARMUP + steps + 1):
            moments.append(time.perf_counter())
            one_step()
        return [after - before for before, after in itertools.pairwise(moments[WARMUP:])]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    for _ in range(WARMUP):
        one_step()
    events[0].record()
    for event in events[1:]:
        one_step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(events)]


def run(setting: Setting, timeout_s: float) -> dict[str, Any]:
    """What a setting's process printed; `failed` where it did not."""
    command = [sys.executable, __file__, "--contest", json.dumps(asdict(setting))]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    if setting.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {timeout_s:g} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        # A compiler's own out-of-memory comes wrapped in its exception.
        return {"failed": "out of memory" if "OutOfMemoryError" in done.stderr else lines[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def settings_of(args: argparse.Namespace) -> list[Setting]:
    settings = []
    for name in args.models:
        seq_len, micro_batches = (32, (2, 4)) if args.tiny else MODELS[name]
        grid = itertools.product(args.dtype, args.attention, args.compile_mode, args.micro_batch or micro_batches)
        for dtype, backend, compile_mode, micro_batch in grid:
            settings.append(
                Setting(
                    model=name, dtype=dtype, attention=backend, compile=compile_mode, micro_batch=micro_batch,
                    seq_len=args.seq_len or seq_len, accumulate=args.accumulate, steps=args.steps, device=args.device,
                    tiny=args.tiny,
                )
            )  # fmt: skip
    return settings


def row(setting: Setting, found: dict[str, Any], peak_flops: float) -> str:
    """A line of the table."""
    what = f"{setting.model}{' (tiny)' if setting.tiny else ''} | {setting.dtype} | {setting.attention} "
    what += f"| {setting.compile} | {setting.accumulate} × {setting.micro_batch} × {setting.seq_len}"
    if "failed" not in found and not all(map(math.isfinite, found["losses"])):
        found = {"failed": f"the loss is {found['losses'][-1]}"}
    if "failed" in found:
        return f"| {what} | did not run: {found['failed']} |"
    seconds = statistics.median(found["seconds"])
    rate = setting.accumulate * setting.micro_batch * setting.seq_len / seconds
    return (
        f"| {what} | {rate:,.0f} | {rate * found['flops_per_token'] / peak_flops:.1%} | {1000 * seconds:,.1f} "
        f"| {1000 * min(found['seconds']):,.1f} – {1000 * max(found['seconds']):,.1f} | {found['memory'] / 2**30:,.2f} "
        f"| {found['first']:.1f} | {found['losses'][0]:.2f} – {found['losses'][-1]:.2f} |"
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["bfloat16"])
    parser.add_argument(
        "--attention", nargs="+", default=["sdpa"], help="manual, sdpa, flex, flash or auto, as model.attention"
    )
    parser.add_argument(
        "--compile-mode", nargs="+", choices=COMPILE, default=["default", "max-autotune-no-cudagraphs"],
        help="off, block, or how hard the whole step is compiled, as parallel.compile_mode",
    )  # fmt: skip
    parser.add_argument("--micro-batch", nargs="+", type=int, help="default: two of each model")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--seq-len", type=int, help="default: that of each model's recipe")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two narrow layers, to see that it runs")
    parser.add_argument("--peak-flops", type=float, default=989e12, help="that MFU is a share of; default: H100's")
    parser.add_argument("--timeout", type=float, default=400.0, help="longest time of a setting [s]")
    args = parser.parse_args(argv)
    settings = settings_of(args)
    print(f"{len(settings)} settings; MFU of {args.peak_flops / 1e12:,.0f} TFLOP/s; {args.steps} steps each, medians\n")
    print(
        "| model | dtype | attention | compile | tokens | tokens/s | MFU | ms | least – most | GiB | first s | loss |"
    )
    print(f"|{'---|' * 12}", flush=True)
    for setting in settings:
        print(row(setting, run(setting, args.timeout), args.peak_flops), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contest"]:
        contest(Setting(**json.loads(sys.argv[2])))
    else:
        main(sys.argv[1:])
