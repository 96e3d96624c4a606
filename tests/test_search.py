"""The micro-batch by search: on the real command line, on one and two ranks, within a limit of memory."""

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from test_loop import losses

from modalities import compiling, devices, dist, loop, search
from modalities.dist import World
from modalities.recipe import Recipe, memory_per_rank

ROOT = Path(__file__).parents[1]
ONE = World(0, 1, torch.device("cpu"), None)
MICRO_BATCHES = [1, 2, 4, 8]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "modalities" / "micro_batch.json"


@contextlib.contextmanager
def at_most(room: int) -> Iterator[None]:
    """This process may take no more than so many bytes of address space."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def auto(recipe: Recipe) -> Recipe:
    return replace(recipe, parallel=replace(recipe.parallel, micro_batch="auto"))


RECIPE = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import tiny
recipe = tiny.recipe(Path({folder!r}), steps=4)
"""


def train(folder: Path, *args: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    tiny.recipe(folder)
    (folder / "small.py").write_text(RECIPE.format(tests=str(ROOT / "tests"), folder=str(folder)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / "train.py"), "--recipe", str(folder / "small.py"), *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_auto_trains_as_a_given_micro_batch_does(ranks: int, tmp_path: Path, cache: Path) -> None:
    found = train(tmp_path, "--name", "auto", "--parallel.micro-batch", "auto", ranks=ranks)
    assert found.returncode == 0, found.stderr
    rows = found.stdout.partition("verdict\n")[2].partition("parallel.micro_batch auto:")
    sizes = [int(line.split()[0]) for line in rows[0].splitlines()]
    assert sizes == MICRO_BATCHES[: len(sizes)] and sizes[-1] <= 8 // ranks
    chosen = int(rows[2].split()[0])
    assert chosen in sizes and list(json.loads(cache.read_text()).values()) == [chosen]
    recipe = json.loads((tmp_path / "runs/auto/recipe.json").read_text())
    assert recipe["parallel"]["micro_batch"] == "auto" and recipe["data"]["global_batch"] == 8

    given = train(tmp_path, "--name", "given", "--parallel.micro-batch", str(chosen), ranks=ranks)
    assert given.returncode == 0, given.stderr
    assert losses(tmp_path / "runs/auto") == losses(tmp_path / "runs/given")

    again = train(tmp_path, "--name", "again", "--parallel.micro-batch", "auto", ranks=ranks)
    assert f"parallel.micro_batch auto: {chosen}, as found before" in again.stdout and "verdict" not in again.stdout


def test_sizes_divide_every_global_batch_of_a_rank(tmp_path: Path) -> None:
    recipe = auto(tiny.recipe(tmp_path))

    def sizes(global_batch: int, ramp: tuple[tuple[int, int], ...] = (), ranks: int = 1) -> list[int]:
        data = replace(recipe.data, global_batch=global_batch, ramp=ramp)
        return search.candidates(replace(recipe, data=data), replace(ONE, size=ranks))

    assert sizes(16) == [1, 2, 4, 8, 16] and sizes(16, ranks=4) == [1, 2, 4]
    assert sizes(12) == [1, 2, 4, 12] and sizes(15) == [1, 3, 15] and sizes(7) == [1, 7]
    assert sizes(8, ((1000, 12),)) == [1, 2, 4]


def test_the_answer_is_kept_for_what_it_depends_on(tmp_path: Path) -> None:
    recipe = auto(tiny.recipe(tmp_path))
    key = search.cache_key(recipe, ONE)
    assert key == search.cache_key(replace(recipe, name="other", steps=7, seed=3), ONE)
    others = [
        search.cache_key(recipe, replace(ONE, size=2)),
        search.cache_key(replace(recipe, model=replace(recipe.model, num_layers=3)), ONE),
        search.cache_key(replace(recipe, data=replace(recipe.data, seq_len=16)), ONE),
        search.cache_key(replace(recipe, parallel=replace(recipe.parallel, param_dtype="bfloat16")), ONE),
    ]
    assert len({key, *others}) == 5


def test_without_a_compiler_it_is_the_eager_run_that_is_foretold_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = tiny.recipe(tmp_path)
    compiled = replace(eager, parallel=replace(eager.parallel, compile="model"))
    # A GPU needs no compiler of C++: there they differ in any case.
    assert memory_per_rank(compiled, 1, "cuda") != memory_per_rank(eager, 1, "cuda")
    monkeypatch.setenv("CXX", str(tmp_path / "no-such"))
    assert memory_per_rank(compiled, 1) == memory_per_rank(eager, 1)
    assert search.cache_key(auto(compiled), ONE) == search.cache_key(auto(eager), ONE)


def remember(recipe: Recipe, world: World, value: object) -> None:
    path = compiling.user_cache() / "micro_batch.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({search.cache_key(recipe, world): value}))


@pytest.mark.parametrize("value", ["2", 2.0, True, None, [2], 3])
def test_what_is_no_size_is_not_taken_from_the_cache(value: object, tmp_path: Path) -> None:
    recipe = auto(tiny.recipe(tmp_path))
    remember(recipe, ONE, 2)
    assert search.resolve(recipe, ONE, must_not_build).parallel.micro_batch == 2
    remember(recipe, ONE, value)
    with pytest.raises(AssertionError, match="built"):
        search.resolve(recipe, ONE, must_not_build)


def test_what_no_longer_fits_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    recipe = auto(replace(recipe, data=replace(recipe.data, global_batch=2**17)))
    with at_most(4 * 2**30):
        remember(recipe, ONE, 64)
        assert search.resolve(recipe, ONE, must_not_build).parallel.micro_batch == 64
        remember(recipe, ONE, 2**17)
        with pytest.raises(AssertionError, match="built"):
            search.resolve(recipe, ONE, must_not_build)


def take_from_two_caches(folder: Path) -> None:
    """Rank 1 has another user's cache, of another size: that of rank 0 holds."""
    os.environ["XDG_CACHE_HOME"] = str(folder / os.environ["RANK"])
    with dist.setup() as world:
        recipe = auto(tiny.recipe(folder))
        remember(recipe, world, 2 if world.is_main else "four")
        assert search.resolve(recipe, world, must_not_build).parallel.micro_batch == 2


def test_ranks_take_the_main_ranks_answer(tmp_path: Path) -> None:
    tiny.recipe(tmp_path)
    tiny.run_ranks(2, take_from_two_caches, tmp_path)


# Linux alone lets a process begin its peak anew; elsewhere there is nothing to hold the figure against.
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures what Linux tells")
def test_the_peak_of_a_trial_is_not_the_runs(tmp_path: Path) -> None:
    def build(recipe: Recipe, world: World) -> tuple[loop.Run, loop.TrainState]:
        torch.ones(2**26)  # 256 MiB
        return loop.build(recipe, world)

    before = search.start_peak(ONE.device)
    trials = search.search(auto(tiny.recipe(tmp_path)), ONE, build, room=2.0**40)
    assert all(trial.peak > 0.9 * 2**28 for trial in trials)
    assert devices.peak_memory(ONE.device) - before < 2**27


def test_several_gpus_are_not_filled_to_the_brim(tmp_path: Path) -> None:
    """Decided before a device is touched."""
    recipe, gpus = auto(tiny.recipe(tmp_path)), replace(ONE, size=2, device=torch.device("cuda"))
    needed = search.foretold(recipe, 2, gpus)
    verdict = search.attempt(search.with_size(recipe, 2), gpus, must_not_build, room=needed / 0.97).verdict
    assert verdict.startswith("would need")


def test_what_does_not_fit_is_not_tried(tmp_path: Path) -> None:
    recipe = auto(tiny.recipe(tmp_path))
    two = memory_per_rank(search.with_size(recipe, 2), 1)
    room = sum(two.values()) / search.FILL * 1.01
    assert search.attempt(search.with_size(recipe, 4), ONE, loop.build, room).verdict.startswith("would need 0.00 GiB")
    with pytest.raises(AssertionError, match="built"):
        search.attempt(search.with_size(recipe, 2), ONE, must_not_build, room)


def must_not_build(recipe: Recipe, world: World) -> tuple[loop.Run, loop.TrainState]:
    raise AssertionError("built")


def attempt_where_one_rank_is_full(folder: Path) -> None:
    """A size fails on all ranks where it fails on one, and the search goes on to say so on all."""
    with dist.setup() as world:
        recipe = auto(tiny.recipe(folder))

        def build(recipe: Recipe, world: World) -> tuple[loop.Run, loop.TrainState]:
            run, state = loop.build(recipe, world)
            if world.rank == 1 and recipe.parallel.micro_batch == 2:
                torch.empty(2**60)  # the allocator's own error, before any exchange between ranks
            return run, state

        fits, full = (search.attempt(search.with_size(recipe, size), world, build, 2.0**40) for size in (1, 2))
        assert fits.verdict == "" and fits.tokens_per_s > 0
        assert full.verdict == "out of memory" and full.tokens_per_s == 0
        assert all(trials == [fits, full] for trials in dist.gather_objects([fits, full]))


def test_ranks_agree_where_one_is_full(tmp_path: Path) -> None:
    tiny.recipe(tmp_path)
    tiny.run_ranks(2, attempt_where_one_rank_is_full, tmp_path)


@pytest.mark.parametrize("micro_batch", ["8", "auto"])
def test_running_out_of_memory_ends_in_one_line(micro_batch: str, tmp_path: Path) -> None:
    """Within RLIMIT_AS: a given size runs into the allocator's error, and a search finds that nothing fits."""
    tiny.recipe(tmp_path)
    code = f"""
import resource, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from dataclasses import replace
from pathlib import Path
import tiny
import torch
from modalities import cli, loop
recipe = tiny.recipe(Path("."), steps=1, model=replace(tiny.MODEL, width=1024, num_layers=4, max_seq_len=1024))
recipe = replace(recipe, data=replace(recipe.data, seq_len=1024), eval=replace(recipe.eval, every=0))
micro_batch = {micro_batch!r}
recipe = replace(recipe, parallel=replace(
    recipe.parallel, micro_batch=micro_batch if micro_batch == "auto" else int(micro_batch)))
def main(args):
    torch.ones(8, 8) @ torch.ones(8, 8)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    room = {"120 * 2**20" if micro_batch == "auto" else "1500 * 2**20"}
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    loop.train(recipe)
cli.run(main)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    what = "not even 1 sequence fits" if micro_batch == "auto" else "out of memory with parallel.micro_batch 8"
    assert what in done.stderr
    assert ("lower parallel.micro_batch" in done.stderr) == (micro_batch == "8")
    for knob in ("activation_checkpointing", "loss.implementation chunked", "more ranks", "cpu_offload"):
        assert knob in done.stderr


def test_the_limit_of_a_process_counts() -> None:
    before = devices.available(torch.device("cpu"))
    with at_most(2**30):
        assert 0.9 * 2**30 < devices.available(torch.device("cpu")) <= min(before, 2**30)
    assert devices.available(torch.device("cpu"), ranks_here=2) == pytest.approx(before / 2, rel=0.1)
