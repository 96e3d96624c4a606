"""This process among the others: one without torchrun, and two gloo ranks with its environment."""

import errno
from pathlib import Path

import pytest
import tiny
import torch

from modalities import dist, ranks


def test_one_process_needs_no_process_group() -> None:
    with dist.setup() as world:
        assert (world.rank, world.size, world.mesh, world.is_main) == (0, 1, None, True)
        assert not torch.distributed.is_initialized()
        assert dist.sum_over_ranks(torch.tensor(3.0)) == 3 and dist.broadcast_from_main("x") == "x"
        assert dist.gather_objects("x") == ["x"]
        dist.barrier()


def talk(folder: Path) -> None:
    with dist.setup() as world:
        assert (world.size, ranks.world_size(), world.is_main, ranks.is_main()) == (
            2,
            2,
            world.rank == 0,
            world.rank == 0,
        )
        assert world.mesh is not None and world.mesh.mesh_dim_names == ("shard",)
        assert dist.sum_over_ranks(torch.tensor(world.rank + 1.0)) == 3
        assert dist.broadcast_from_main(f"from {world.rank}") == "from 0"
        assert dist.gather_objects(world.rank * 10) == [0, 10]
        with dist.all_or_none():
            pass
        # A mistake that shows on the second rank alone stops both, with the same words.
        with pytest.raises(ValueError, match="^the file of rank 1 is missing$"), dist.all_or_none():
            if world.rank == 1:
                raise FileNotFoundError("the file of rank 1 is missing")
        # What may work again stays such a thing, so that whoever started the ranks starts them again.
        with pytest.raises(ranks.PassingError, match="the disk of rank 1") as failed, dist.all_or_none():
            if world.rank == 1:
                raise OSError(errno.EIO, "the disk of rank 1")
        assert ranks.status_of(failed.value) == ranks.CRASHED
        (folder / f"{world.rank}").touch()
    assert not torch.distributed.is_initialized()


def test_two_ranks_agree(tmp_path: Path) -> None:
    tiny.run_ranks(2, talk, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_a_mistake_in_one_process_keeps_its_kind() -> None:
    with pytest.raises(FileNotFoundError, match="gone"), dist.all_or_none():
        raise FileNotFoundError("gone")


@pytest.mark.parametrize(
    "size, given, expected",
    [(8, (1, -1, 1), (1, 8, 1)), (8, (2, -1, 2), (2, 2, 2)), (1, (1, -1, 1), (1, 1, 1)), (6, (3, 2, 1), (3, 2, 1))],
)
def test_the_rest_of_the_ranks_shard(size: int, given: tuple[int, int, int], expected: tuple[int, int, int]) -> None:
    assert dist.degrees(size, *given) == expected


@pytest.mark.parametrize("size, given", [(8, (3, -1, 1)), (4, (1, 2, 1)), (1, (1, -1, 2)), (2, (2, 2, 1))])
def test_degrees_that_do_not_make_up_the_ranks_are_refused(size: int, given: tuple[int, int, int]) -> None:
    with pytest.raises(
        ValueError, match=f"^parallel.replicate {given[0]} .*but the number of ranks is {size}; [^\n]*$"
    ):
        dist.degrees(size, *given)


def data_of_a_tensor_parallel_world() -> None:
    with dist.setup(tensor=2) as world:
        assert world.mesh is not None and world.mesh.mesh_dim_names == ("shard", "tensor")
        assert (world.data_rank, world.data_size) == (world.rank // 2, 1)
        # Both ranks have the same data, of which a sum has one.
        assert dist.sum_over_ranks(torch.tensor(5), world.data_group) == 5
        assert dist.sum_over_ranks(torch.tensor(5)) == 10


def test_ranks_that_share_tensors_read_the_same_data() -> None:
    tiny.run_ranks(2, data_of_a_tensor_parallel_world)
