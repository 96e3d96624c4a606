"""The rows of `faults.py` about files: no room to write them, damage to what was written, and malice in it."""

import contextlib
import io
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from benchmarks.victims import ROOT, Ranks, Result, Trial, checkpoint_at, command, edited, newest, same
from modalities import durable, shards
from modalities.pbin import open_pbin, read_idx

PAGE = 4096  # bytes


def full_disks(trial: Trial) -> Result:
    """No room for the checkpoint (a limit of file sizes on rank 1, a full tmpfs), the log (/dev/full), a `.pbin`."""
    straight, passed = trial.straight(), []

    def limited(rank: int) -> None:
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    def full_log(rank: int) -> None:
        log = trial.run("full-log") / "metrics.jsonl"
        if rank == 0:
            log.unlink()
            log.symlink_to("/dev/full")

    for name, hook, words in (("full", limited, "cannot be written"), ("full-log", full_log, "metrics.jsonl")):
        run = trial.begun(name, straight.name, 2)
        launch = Ranks(trial.folder, 2, command(name, 6, "--checkpoint.every", 2), hook)
        statuses, errors = launch.wait(), [line for line in launch.err().splitlines() if "warning: " not in line]
        one_line = len(errors) <= len(statuses) and any(words in line for line in errors)  # each rank may say it
        older = newest(run) == checkpoint_at(run, 2) and same(checkpoint_at(run, 2), checkpoint_at(straight, 2))
        passed.append(trial.holds(1 in statuses and one_line and older, launch))

    with small_file_system(trial.begun("full-fs", straight.name, 2)) as small:
        if small is not None:
            launch = Ranks(trial.folder, 2, command("full-fs", 6, "--checkpoint.every", 2))
            statuses, told = launch.wait(), launch.err()
            older = newest(small) == checkpoint_at(small, 2) and same(
                checkpoint_at(small, 2), checkpoint_at(straight, 2)
            )
            passed.append(trial.holds(1 in statuses and "cannot be written" in told and older, launch))
    real = ", one of them of a file system with 64 KiB left" if small else ""

    corpus, tokenizer = trial.folder / "docs.jsonl", Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(trial.folder / "words.json"))
    corpus.write_text(f'{{"text": "{"a " * 50}"}}\n' * 2000)
    pack = ["pack", str(corpus), "--tokenizer", "words.json", "--out", "full.pbin"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "prep.py"), *pack], cwd=trial.folder, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    errors = done.stderr.splitlines()
    passed.append(done.returncode == 1 and len(errors) == 1 and not (trial.folder / "full.pbin").exists())
    return Result(len(passed), sum(passed), f"one line each{real}; the older checkpoint loads")


@contextlib.contextmanager
def small_file_system(run: Path) -> Iterator[Path | None]:
    """Have `run` lie on a file system of its own, with 64 KiB left; None where this user may mount none."""
    size = sum(path.stat().st_size // PAGE * PAGE + 2 * PAGE for path in run.rglob("*"))
    copy = run.rename(run.with_name("copy"))
    run.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size + 2**16}", "faults", str(run)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        shutil.copytree(copy, run, dirs_exist_ok=True)
        yield run
    finally:
        subprocess.run(["umount", str(run)], check=True)


def flips(trial: Trial) -> Result:
    """Bits flipped, files cut short, pages zeroed and files gone in the newest checkpoint."""
    run = trial.begun("flipped", trial.straight().name, 4)
    shutil.copytree(checkpoint_at(trial.straight(), 6), checkpoint_at(run, 6))
    files = sorted(path for path in checkpoint_at(run, 6).iterdir())
    counts = {"bit flips": 200, "truncations": 50, "zeroed pages": 20, "missing": len(files)}
    found = dict.fromkeys(counts, 0)
    for kind, count in counts.items():
        for i in range(count):
            # Every byte is as likely as any other, whichever file it is in.
            (path,) = trial.random.choices(files, [file.stat().st_size for file in files])
            path = files[i] if kind == "missing" else path
            with edited(path):
                damage(path, kind, trial.random)
                found[kind] += newest(run) == checkpoint_at(run, 4)
    assert newest(run) == checkpoint_at(run, 6), "undone, it is whole again"
    return Result(sum(counts.values()), sum(found.values()), ", ".join(f"{n} {kind}" for kind, n in found.items()))


def damage(path: Path, kind: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    match kind:
        case "bit flips":
            content[place] ^= 1 << rng.randrange(8)
        case "truncations":
            del content[place:]
        case "zeroed pages":
            begin = place // PAGE * PAGE
            page = content[begin : begin + PAGE]
            content[begin : begin + PAGE] = bytes(len(page)) if any(page) else b"\1" * len(page)
    path.unlink() if kind == "missing" else path.write_bytes(content)


class Malice:
    """Unpickled, it runs a command."""

    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.function, self.args


def malice(trial: Trial) -> Result:
    """Pickles that would run a command: in files of a checkpoint, hashes made right, in a `.pbin` and an `.idx`."""
    run = trial.begun("malice", trial.straight().name, 4)
    proof, folder = trial.folder / "executed", checkpoint_at(run, 4)
    touch = f"open({str(proof)!r}, 'w').close()"
    things = [Malice(os.system, f"touch {proof}"), Malice(eval, touch), Malice(exec, touch)]
    things.append(Malice(subprocess.check_call, ["touch", str(proof)]))
    executed = tried = 0
    for path in sorted(folder.iterdir()):
        for thing in things:
            for content in (pickle.dumps(thing), as_tensor_file(thing)):
                with edited(path), edited(folder / durable.MANIFEST):
                    path.write_bytes(content)
                    if path.name != durable.MANIFEST:
                        make_right(folder, path)
                    attempt(folder)
                tried, executed = tried + 1, executed + proof.exists()
                proof.unlink(missing_ok=True)
    for path in sorted(folder.glob("*.distcp")):
        for thing in things:
            with edited(path), edited(folder / shards.METADATA), edited(folder / durable.MANIFEST):
                point_at(folder, path, as_tensor_file(thing))
                attempt(folder)
            tried, executed = tried + 1, executed + proof.exists()
            proof.unlink(missing_ok=True)
    (trial.folder / "docs.jsonl").write_text('{"text": "a"}\n')
    for thing in things:
        source = (trial.folder / "web.pbin").read_bytes()
        (trial.folder / "evil.pbin").write_bytes(source[: 12 + 1100] + pickle.dumps([thing], 4))
        with contextlib.suppress(ValueError):  # that it is refused is as good as that it is read as nothing
            _ = open_pbin(trial.folder / "evil.pbin").index
        tried, executed = tried + 1, executed + proof.exists()
        proof.unlink(missing_ok=True)
        (trial.folder / "docs.idx").write_bytes(pickle.dumps([thing], 4))
        with contextlib.suppress(ValueError):
            read_idx(trial.folder / "docs.idx", trial.folder / "docs.jsonl")
        tried, executed = tried + 1, executed + proof.exists()
        proof.unlink(missing_ok=True)
    # The same pickles are dangerous to a reader that trusts them.
    pickle.loads(pickle.dumps(things[1]))
    assert proof.exists()
    proof.unlink()
    torch.load(io.BytesIO(as_tensor_file(things[1])), weights_only=False)
    assert proof.exists()
    return Result(tried, tried - executed, f"{executed} executions")


def make_right(folder: Path, *paths: Path) -> None:
    """Give a checkpoint's manifest the sizes and hashes that the files have now."""
    manifest = durable.read_facts(folder)
    for path in paths:
        manifest["files"][path.name] = durable.hash_file(path)
    facts = {key: value for key, value in manifest.items() if key not in ("files", "sha256")}
    durable.write_manifest(folder, facts, manifest["files"])


def point_at(folder: Path, path: Path, evil: bytes) -> None:
    """Make `path` hold `evil`, and `.metadata` say that each of its tensors is all of that."""
    metadata = shards.read_metadata(folder, durable.read_facts(folder)["files"])
    for info in metadata.storage_data.values():
        if info.relative_path == path.name:
            info.offset, info.length = 0, len(evil)
    path.write_bytes(evil)
    (folder / shards.METADATA).write_bytes(pickle.dumps(metadata))
    make_right(folder, path, folder / shards.METADATA)


def as_tensor_file(thing: Malice) -> bytes:
    """What torch.save makes of it."""
    with tempfile.TemporaryFile() as file:
        torch.save(thing, file)
        file.seek(0)
        return file.read()


def attempt(folder: Path) -> None:
    """Read a checkpoint as far as it goes: find it, and load all of its tensors."""
    with contextlib.suppress(ValueError):  # that it is refused is hoped for; whether it executed is counted
        if newest(folder.parent) is not None:
            files = durable.read_facts(folder)["files"]
            names = shards.read_metadata(folder, files).state_dict_metadata
            tensors = {name: facts for name, facts in names.items() if isinstance(facts, TensorStorageMetadata)}
            state = {name: torch.empty(facts.size, dtype=facts.properties.dtype) for name, facts in tensors.items()}
            shards.read(shards.Reader(folder, files), state)
