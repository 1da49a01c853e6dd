"""Work shared by ranks; here ranks are threads that meet at a barrier."""

import pytest

from fulgurite.checkpoints import CheckpointError, DamagedError
from fulgurite.methods.ranks import ALONE, Ranks


def test_every_name_is_one_ranks_and_sizes_are_balanced():
    sizes = {f"t{i}": size for i, size in enumerate([100, 1, 40, 60, 3, 0, 55, 45])}
    shares = [Ranks(rank, 3).share(sizes) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= 5
    assert sorted(ALONE.share(sizes)) == sorted(sizes)


def test_all_ranks_know_what_all_return(on_ranks):
    assert on_ranks(3, lambda ranks: ranks.together(lambda: ranks.rank * 10)) == [[0, 10, 20]] * 3
    assert ALONE.together(lambda: 7) == [7]


@pytest.mark.parametrize("kind", [ValueError, AttributeError, ImportError, StopIteration, AssertionError])
def test_where_one_rank_fails_all_raise(kind, on_ranks):
    def work(ranks):
        def fails():
            if ranks.rank == 1:
                raise kind("no such thing")
            return ranks.rank

        ranks.agree(fails)

    first, second = on_ranks(2, work)
    assert isinstance(second, kind)
    assert f"rank 1 failed: {kind.__name__}: no such thing" in str(first)
    with pytest.raises(ZeroDivisionError):
        ALONE.agree(lambda: 1 / 0)


def test_what_is_wrong_with_a_checkpoint_of_one_rank_is_a_checkpoint_error_on_all(on_ranks):
    def work(ranks):
        def fails():
            if ranks.rank == 1:
                raise DamagedError("a.safetensors is cut short")

        ranks.agree(fails)

    first, second = on_ranks(2, work)
    assert (type(first), type(second)) == (CheckpointError, DamagedError)
    assert "rank 1 failed: DamagedError: a.safetensors is cut short" in str(first)
