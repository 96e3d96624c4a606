"""From launch to the end of the first step: `train.py` against a bare script that does the same. And `--help`.

    python benchmarks/launch.py [--recipe gpt2_60m] [--micro-batch 4] [--repeats 3]

Both train one step of one micro-batch in bf16, compiled as a whole, with fused AdamW, on random tokens. The bare script
imports torch alone: a plain model of the same layers, torch.compile, a batch made on the spot; it keeps no log, data
order, checkpoint or folder. The time is that between starting Python and reading of the step's end on its output.
Cold: with an empty cache of compiled programs; warm: with that of the run before. The two take turns.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def bare(vocab: int, layers: int, width: int, heads: int, mlp: int, seq_len: int, micro_batch: int) -> None:
    """The bare script: what a step needs, and no more."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    def rotate(x_BHTD: Tensor) -> Tensor:
        half = x_BHTD.shape[-1] // 2
        wavelengths = 10_000 ** (torch.arange(half, device=x_BHTD.device) / half)
        angles = torch.arange(x_BHTD.shape[2], device=x_BHTD.device)[:, None] / wavelengths
        x, y = x_BHTD.float().chunk(2, -1)
        rotated = torch.cat((x * angles.cos() - y * angles.sin(), y * angles.cos() + x * angles.sin()), -1)
        return rotated.to(x_BHTD.dtype)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
            self.gate, self.up = nn.Linear(width, mlp, bias=False), nn.Linear(width, mlp, bias=False)
            self.down = nn.Linear(mlp, width, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in self.qkv(self.norm1(x)).chunk(3, -1))
            seen = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + self.out(seen.transpose(1, 2).flatten(2))
            h = self.norm2(x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(-(-vocab // 128) * 128, width)
            self.blocks = nn.ModuleList(Block() for _ in range(layers))
            self.norm = nn.RMSNorm(width)
            nn.init.normal_(self.embed.weight, std=0.02)

        def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
            x = self.embed(inputs)
            for block in self.blocks:
                x = block(x)
            return F.cross_entropy(F.linear(self.norm(x), self.embed.weight).float().flatten(0, 1), targets.flatten())

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs, targets = torch.randint(vocab, (2, micro_batch, seq_len)).to(device)
    with torch.autocast(device, torch.bfloat16):
        loss = torch.compile(model, fullgraph=True, dynamic=False)(inputs, targets)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    print(f"step 1/1 loss {loss.item():.4f} |grad| {norm.item():.3f}", flush=True)


def seconds_to_first_step(args: list[str], cwd: Path, cache: Path) -> float:
    """From starting Python until a line begins with "step 1/1"."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *args], cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seconds = next((time.perf_counter() - began for line in process.stdout if line.startswith("step 1/1")), None)
    process.stdout.read()
    if process.wait() or seconds is None:
        sys.exit(f"{args[0]} failed; what it said is above")
    return seconds


def seconds_of(args: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *args], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main(recipe: str = "gpt2_60m", micro_batch: int = 4, repeats: int = 3) -> None:
    import numpy as np

    from modalities.pbin import write_pbin
    from modalities.recipe import load

    found, _ = load(recipe)
    model, seq_len = found.model, found.data.seq_len
    sizes = [model.vocab_size, model.num_layers, model.width, model.num_heads, model.mlp_hidden, seq_len, micro_batch]
    times: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with write_pbin(folder / "tokens.pbin", model.vocab_size) as append:
            append(np.random.default_rng(0).integers(0, model.vocab_size, 1000 * seq_len))
        ours = [str(ROOT / "train.py"), "--recipe", recipe, "--steps", "1", "--data.train", "tokens.pbin"]
        ours += ["--data.val", "--data.tokenizer", "", "--eval.every", "0", "--sample.every", "0", "--name"]
        batch = ["--data.global-batch", f"{micro_batch}", "--parallel.micro-batch", f"{micro_batch}"]
        warm_up = ["--optim.schedule.warmup", "0", "--checkpoint.every", "0"]
        for i in range(repeats):
            for state in ("cold", "warm"):
                commands = {
                    "train.py": [*ours, f"run-{i}-{state}", *batch, *warm_up],
                    "bare script": [str(Path(__file__).resolve()), "bare", json.dumps(sizes)],
                }
                for contestant, args in commands.items():
                    cache = folder / f"cache-{i}-{contestant[:4]}"
                    seconds = seconds_to_first_step(args, folder, cache)
                    times.setdefault((contestant, state), []).append(seconds)
                    print(f"{contestant} {state}: {seconds:.2f} s", file=sys.stderr)
    medians = {key: statistics.median(values) for key, values in times.items()}
    listing = statistics.median(seconds_of([str(ROOT / "train.py"), "--help"]) for _ in range(5))
    importing = statistics.median(seconds_of(["-c", "import torch"]) for _ in range(5))
    print(f"| {recipe}, {micro_batch} × {seq_len} tokens | train.py [s] | bare script [s] | ratio |\n|---|---|---|---|")
    for state in ("cold", "warm"):
        mine, bare_ = medians["train.py", state], medians["bare script", state]
        print(f"| launch to the end of step 1, {state} | {mine:.2f} | {bare_:.2f} | {mine / bare_:.2f} |")
    print(f"| train.py --help | {listing:.2f} | | |\n| import torch alone | | {importing:.2f} | |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["bare"]:  # without the package, not even its command line
        bare(*json.loads(sys.argv[2]))
    else:
        from modalities import cli

        cli.run(lambda argv: cli.call(main, argv, prog="benchmarks/launch.py"))
