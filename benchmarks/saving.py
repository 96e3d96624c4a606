"""Saving and restoring a training state, against safetensors and a hash of the same bytes.

    python benchmarks/saving.py [--recipe gpt2_60m --ranks 1 --repeats 5 --folder DIR]

The state is a recipe's weights in fp32 and AdamW's moments, on the GPU if there is one, sharded over the ranks. The
other side writes each rank's part with `safetensors.torch.save_file`, forces it to the disk and hashes the file, and
reads it back into the same tensors after hashing it again: in one thread a rank, without metadata, manifest, rename,
or agreement of ranks. Ours is `checkpoint.save`, and `checkpoint.newest` with `checkpoint.restore`; files are in the
page cache when they are read. What an asynchronous save blocks is the call of `Saver.save`, after the first, which
also gets its buffers. The slowest rank counts; the contestants take turns; medians (least – most). The ratio of the
fastest rounds is for machines that must ask their host for memory, where the same write takes from 0.1 to 6 s.
"""

import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = ("safetensors save", "save", "blocked, first", "blocked", "safetensors load", "restore")


def contest(rank: int, ranks: int, port: int, name: str, repeats: int, folder: str) -> None:
    """All contestants on one rank; rank 0 prints."""
    if ranks > 1:
        os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{ranks}", LOCAL_WORLD_SIZE=f"{ranks}")
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=f"{port}")
    import torch
    from safetensors.torch import load_file, save_file

    from modalities import checkpoint, dist, durable, fsdp, optim, recipe, saving
    from modalities.model import build_skeleton
    from modalities.step import TrainState

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    chosen, run = recipe.load(name)[0], Path(folder)
    file = run / f"{rank}.safetensors"
    seconds: dict[str, list[float]] = defaultdict(list)
    with dist.setup() as world:
        model = build_skeleton(chosen.model)
        fsdp.parallelize(model, world.mesh, chosen.parallel)
        params = fsdp.init_params(model, 0, world.device)
        opt_state = optim.make(chosen.optim, params).init(params)
        state = TrainState(params, opt_state)
        parts = checkpoint.parts_of(state)
        for part in parts.values():
            part.detach().copy_(torch.randn(part.shape))

        def timed(what: str, call: Callable[[], object]) -> None:
            if world.is_main:
                os.sync()  # what the one before left to be written
            dist.barrier()
            began = time.perf_counter()
            call()
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[what].append(max(dist.gather_objects(time.perf_counter() - began)))

        def forget(step: int) -> None:
            """Delete a checkpoint: whoever writes finds as much memory free in the page cache as it is to take."""
            if world.is_main and step > 0:
                durable.remove(checkpoint.path_of(run, step))

        def save_safetensors() -> None:
            save_file({part_name: part.detach().contiguous() for part_name, part in parts.items()}, file)
            durable.fsync(file)
            durable.hash_file(file)

        def load_safetensors() -> None:
            durable.hash_file(file)
            for part_name, tensor in load_file(file).items():
                parts[part_name].detach().copy_(tensor)

        def restore() -> None:
            newest = dist.broadcast_from_main(checkpoint.newest(run) if world.is_main else None)
            assert newest is not None
            checkpoint.restore(newest, state)

        config = checkpoint.CheckpointConfig()
        with saving.saver(config, run, world, {"recipe": {}}, lambda text: None) as saver:
            for i in range(repeats + 1):
                file.unlink(missing_ok=True)
                timed("safetensors save", save_safetensors)
                forget(state.step - 1)
                state.step += 1
                timed("save", lambda: checkpoint.save(run, state, {}, world.is_main))
                forget(state.step - 1)
                state.step += 1
                timed("blocked" if i else "blocked, first", lambda: saver.save(state))
                saver.wait()
                timed("safetensors load", load_safetensors)
                timed("restore", restore)
        num_bytes = sum(dist.gather_objects(sum(part.nbytes for part in parts.values())))
    if rank == 0:
        print(f"{name} on {ranks} rank(s), {num_bytes / 1e6:,.0f} MB, {world.device.type}\n\n{table(seconds)}")


def table(seconds: dict[str, list[float]]) -> str:
    """Each contestant's median, and over that of the other side; (the same of the fastest rounds)."""
    # The first time round files and memory are new, for both.
    taken = {name: all_[1:] if len(all_) > 1 else all_ for name, all_ in seconds.items()}
    median = {name: statistics.median(taken[name]) for name in NAMES}
    bounds = {
        "save": ("safetensors save", 1.2),
        "restore": ("safetensors load", 1.3),
        "blocked": ("save", 0.2),
        "blocked, first": ("save", None),
    }
    rows = ["| | median s | least – most | ratio | bound |", "|---|---|---|---|---|"]
    for name in NAMES:
        to, bound = bounds.get(name, ("", None))
        ratio = f"{median[name] / median[to]:.2f}× {to} ({min(taken[name]) / min(taken[to]):.2f}×)" if to else ""
        row = (name, f"{median[name]:.3f}", f"{min(taken[name]):.3f} – {max(taken[name]):.3f}", ratio, f"{bound or ''}")
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def main(recipe: str = "gpt2_60m", ranks: int = 1, repeats: int = 5, folder: Path | None = None) -> None:
    """Measure.

    Args:
        recipe: Whose model.
        ranks: Processes.
        repeats: Rounds, after a first one.
        folder: Where to write; the disk that is of interest.
    """
    import torch.multiprocessing

    place = tempfile.mkdtemp(dir=folder)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = (ranks, port, recipe, repeats, place)
    try:
        torch.multiprocessing.start_processes(contest, arguments, nprocs=ranks, start_method="spawn")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from modalities import cli

    cli.run(lambda args: cli.call(main, args, prog="python benchmarks/saving.py"))
