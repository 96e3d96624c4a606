"""A run continued is the run itself: to the bit on as many ranks, in the same order on any, and on the same data."""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny
import torch
from test_loop import DROPOUT, losses, mixed_recipe, train, weights

from modalities import folder, loop
from modalities.checkpoint import CheckpointConfig
from modalities.data import TrainData
from modalities.fingerprints import ResumeConfig
from modalities.generate import SampleConfig
from modalities.loss import Batch
from modalities.recipe import Recipe, from_json

Order = dict[int, list[tuple[int, int]]]
"""(source, sequence) of each sequence of a global batch, by how many sequences went before it."""


def ramped_recipe(folder: Path, name: str) -> Recipe:
    """Two sources whose weights change after 96 sequences, in batches of 8, 16 and then 24: 4, 8 and 12 micro-batches.

    Steps 7 and 14, of which there are checkpoints, lie within the ramp and within a stage.
    """
    recipe = mixed_recipe(folder, name)
    data = replace(recipe.data, ramp=((32 * 40, 16), (32 * 150, 24)))
    return replace(recipe, data=data, checkpoint=CheckpointConfig(every=7))


def train_and_record(recipe: Recipe, record: Path) -> None:
    """Train on the ranks that there are, and write which sequences each rank was given."""
    batch = TrainData.batch

    def recorded(self: TrainData, samples: int) -> Batch:
        sources, numbers = (array.tolist() for array in self.order(samples))
        with (record / f"{recipe.name}.{self.world.rank}").open("a") as file:
            file.write(json.dumps({"samples": samples, "order": [*zip(sources, numbers, strict=True)]}) + "\n")
        return batch(self, samples)

    TrainData.batch = recorded  # type: ignore[method-assign]  # it looks on, and gives what it always gave
    try:
        train(recipe)
    finally:
        TrainData.batch = batch  # type: ignore[method-assign]


def order_of(record: Path, name: str) -> Order:
    """What all ranks of a run were given, put together in the order of ranks; its steps follow one another."""
    order: Order = {}
    for path in sorted(record.glob(f"{name}.*")):
        for line in path.read_text().splitlines():
            found = json.loads(line)
            order.setdefault(found["samples"], []).extend((source, number) for source, number in found["order"])
    begins = sorted(order)
    assert all(after == one + len(order[one]) for one, after in zip(begins, begins[1:], strict=False))
    return order


@dataclass(frozen=True)
class Leg:
    """A run, or the rest of one from a checkpoint on."""

    recipe: Recipe
    ranks: int
    begun: str = ""
    """The run that it goes on with; empty: none."""
    step: int = 0
    """Where that one ended."""


def train_legs(legs: Sequence[Leg], ports: Sequence[int], record: Path) -> None:
    """One leg after another, each on as many of the processes as it has ranks; the others wait for the next."""
    rank = int(os.environ["RANK"])
    for leg, port in zip(legs, ports, strict=True):
        os.environ.update(WORLD_SIZE=f"{leg.ranks}", MASTER_PORT=f"{port}")
        if rank == 0 and leg.begun:
            begun = leg.recipe.folder.with_name(leg.begun)
            later = [path.name for path in begun.glob("step-*") if int(path.name[5:]) > leg.step]
            shutil.copytree(begun, leg.recipe.folder, ignore=shutil.ignore_patterns(*later))
        if rank < leg.ranks:
            train_and_record(leg.recipe, record)


def run_legs(legs: Sequence[Leg], record: Path) -> None:
    """All legs in one launch, for importing torch takes longer than they do."""
    with contextlib.ExitStack() as stack:
        places = [stack.enter_context(socket.socket()) for _ in legs]
        for place in places:
            place.bind(("localhost", 0))
        ports = [place.getsockname()[1] for place in places]
    tiny.run_ranks(max(leg.ranks for leg in legs), train_legs, legs, ports, record)


def assert_same_state(a: Recipe, b: Recipe) -> None:
    first, second = weights(a.folder, a.steps), weights(b.folder, b.steps)
    assert len(first) > 10 and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(a.folder) == losses(b.folder)


def assert_each_once(order: Order, per_epoch: Sequence[int]) -> None:
    """Of each source every sequence comes once before any comes again."""
    drawn = [found for begin in sorted(order) for found in order[begin]]
    for source, count in enumerate(per_epoch):
        numbers = [number for s, number in drawn if s == source]
        assert len(numbers) > count, "the run goes into a second epoch"
        assert sorted(numbers[:count]) == list(range(count))
        assert len(set(numbers[count : 2 * count])) == len(numbers[count : 2 * count])


def counts(recipe: Recipe) -> list[int]:
    with loop.dist.setup() as world:
        return [source.count for source in TrainData(recipe.data, 100, recipe.seed, 2, world).sources]


def legs_on(ranks: tuple[int, int, int], folder: Path) -> list[Leg]:
    """A run on `ranks[0]`; and one that goes on from its step 7 on `ranks[1]`, and from step 14 on `ranks[2]`."""
    recipe = replace(ramped_recipe(folder, "straight"), model=tiny.MODEL)  # dropout's numbers are each rank's own
    return [
        Leg(recipe, ranks[0]),
        Leg(replace(recipe, name="second"), ranks[1], "straight", 7),
        Leg(replace(recipe, name="third"), ranks[2], "second", 14),
    ]


def assert_same_run(legs: Sequence[Leg], record: Path) -> None:
    """The last of three legs is the first, which went all the way."""
    straight, _, third = (leg.recipe for leg in legs)
    torch.testing.assert_close(losses(third.folder), losses(straight.folder), rtol=1e-5, atol=0)
    whole, *pieces = (order_of(record, leg.recipe.name) for leg in legs)
    first = {begin: order for begin, order in whole.items() if begin < min(pieces[0])}
    second = {begin: order for begin, order in pieces[0].items() if begin < min(pieces[1])}
    assert [len(piece) for piece in (first, second, pieces[1])] == [7, 7, 6], "each began at its checkpoint"
    joined = first | second | pieces[1]
    assert joined == whole
    assert_each_once(joined, counts(straight))


def test_two_ranks_go_on_to_the_bit_and_by_way_of_one_are_the_same_run(tmp_path: Path) -> None:
    dropout = ramped_recipe(tmp_path, "dropout")
    assert dropout.model == DROPOUT
    to_the_bit = [Leg(dropout, 2), Leg(replace(dropout, name="resumed"), 2, "dropout", 7)]
    legs = legs_on((2, 1, 2), tmp_path)
    run_legs([*to_the_bit, *legs], tmp_path)
    assert_same_state(*(leg.recipe for leg in to_the_bit))
    assert len(order_of(tmp_path, "resumed")) == 13, "it began at the checkpoint"
    assert_same_run(legs, tmp_path)


@pytest.mark.slow
def test_one_rank_then_four_then_two_are_the_same_run(tmp_path: Path) -> None:
    legs = legs_on((1, 4, 2), tmp_path)
    run_legs(legs, tmp_path)
    assert_same_run(legs, tmp_path)


# ------------------------------------------------------------------------------------------------ what may have changed


@pytest.fixture
def begun(tmp_path: Path) -> Recipe:
    """A run of two sources, a mask and a tokenizer, of whose six steps four are done."""
    recipe = mixed_recipe(tmp_path, "begun")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    data = replace(recipe.data, tokenizer=str(tmp_path / "tokenizer.json"), stages=())
    recipe = replace(recipe, steps=6, data=data, checkpoint=CheckpointConfig(every=4))
    train(recipe)
    shutil.rmtree(recipe.folder / "step-00000006")
    return recipe


def rewrite(path: Path) -> None:
    """Flip a bit of the first token; the file stays as long and as valid."""
    content = bytearray(path.read_bytes())
    content[12] ^= 1
    path.write_bytes(content)


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("web.pbin", r"data\.train\[0\]"),
        ("chat.pbin", r"data\.train\[1\]"),
        ("chat_mask.pbin", r"data\.masks\[1\]"),
        ("tokenizer.json", r"data\.tokenizer"),
    ],
)
def test_a_file_that_has_changed_is_refused_by_name(begun: Recipe, tmp_path: Path, name: str, field: str) -> None:
    rewrite(tmp_path / name) if name != "tokenizer.json" else (tmp_path / name).write_text('{"version": "1.1"}')
    before = files_of(begun.folder)
    problem = rf"begun was begun with {field} .*{name}, which has changed since; give .* or --resume\.allow-changes"
    with pytest.raises(ValueError, match=problem):
        train(begun)
    assert files_of(begun.folder) == before


def test_files_that_lie_elsewhere_are_the_same(begun: Recipe, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in tmp_path.glob("*.pbin"):
        path.rename(moved / f"{path.stem}-1.pbin")
    data = begun.data
    train_files, masks = ([name and str(moved / f"{Path(name).stem}-1.pbin") for name in names]
                          for names in (data.train, data.masks))  # fmt: skip
    now = replace(data, train=tuple(train_files), masks=tuple(masks), val=(), val_masks=())
    train(replace(begun, data=now))
    assert len(losses(begun.folder)) == 6
    swapped = replace(now, train=now.train[::-1], masks=("", ""))
    with pytest.raises(
        ValueError, match=r"data\.train\[0\] .*web\.pbin, not .*chat-1\.pbin, which holds something else"
    ):
        train(replace(begun, data=swapped))


def test_another_validation_set_under_the_same_name_is_told(begun: Recipe, tmp_path: Path, capfd: object) -> None:
    assert isinstance(capfd, pytest.CaptureFixture)
    rewrite(tmp_path / "val.pbin")
    train(begun)
    shown = capfd.readouterr().err
    assert shown.count("warning: data.val.val ") == 1 and "which has changed since" in shown


def test_with_leave_a_changed_run_goes_on_and_says_what_it_is(
    begun: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(tmp_path / "web.pbin")
    changed = replace(
        begun, optim=replace(begun.optim, lr=0.5), steps=8, checkpoint=CheckpointConfig(every=2, background=False)
    )
    with pytest.raises(ValueError, match=r"begun with steps 6, not 8; optim\.lr 0\.01, not 0\.5; give"):
        train(changed)
    train(replace(changed, resume=ResumeConfig(allow_changes=True)))
    shown = capsys.readouterr().out
    told = "steps 6, not 8; optim.lr 0.01, not 0.5; data.train[0] "
    assert shown.count(f"changed from step 4 on: the run was begun with {told}") == 1
    lines = [json.loads(line) for line in (begun.folder / "metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if "changes" in line]
    assert line["step"] == 4 and line["changes"][:2] == ["steps 6, not 8", "optim.lr 0.01, not 0.5"]
    # The folder tells the truth, of before and of now; leave was for once, and a checkpoint knows the new file.
    assert from_json(begun.folder / "recipe-00000004.json") == begun
    assert from_json(begun.folder / "recipe.json") == changed
    assert not (begun.folder / "tokenizer-00000004.json").exists(), "it is the same"
    shutil.rmtree(begun.folder / "step-00000008")
    train(changed)
    assert "changed from" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"begun with steps 8, not 6; optim\.lr 0\.5, not 0\.01"):
        train(begun)


def test_another_model_has_no_leave(begun: Recipe) -> None:
    wider = replace(begun, model=replace(begun.model, mlp_width=64), resume=ResumeConfig(allow_changes=True))
    before = files_of(begun.folder)
    with pytest.raises(
        ValueError, match=r"model\.mlp_width 48, not 64, which weights cannot follow; give .* that one$"
    ):
        train(wider)
    assert files_of(begun.folder) == before


def test_a_run_of_an_earlier_version_goes_on(begun: Recipe, tmp_path: Path) -> None:
    """Its checkpoints tell nothing of files."""
    path = begun.folder / "step-00000004" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert {"data.train[0]", "data.train[1]", "data.masks[1]", "data.tokenizer"} < manifest["fingerprints"].keys()
    path.write_text(json.dumps({key: manifest[key] for key in ("step", "samples", "files")}))
    rewrite(tmp_path / "web.pbin")
    train(begun)
    with pytest.raises(ValueError, match=r"data\.train\[0\] .*, not .*chat"):
        train(replace(begun, data=replace(begun.data, train=begun.data.train[::-1])))


def test_a_folder_in_use_is_refused_to_a_second_start(begun: Recipe) -> None:
    with folder.holding(begun.folder) as hold:
        hold()
        with pytest.raises(ValueError, match=rf"is in use by process {os.getpid()} on "):
            loop.train(begun)
    loop.train(begun)


def test_a_tokenizer_that_was_away_once_is_compared_when_it_is_back(begun: Recipe, tmp_path: Path) -> None:
    path = Path(begun.data.tokenizer)
    path.rename(tmp_path / "away.json")
    loop.train(replace(begun, sample=SampleConfig(every=0)))
    path.write_text('{"version": "2.0"}')
    with pytest.raises(ValueError, match=r"data\.tokenizer"):
        loop.train(begun)
