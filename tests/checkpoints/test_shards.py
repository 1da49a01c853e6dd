"""Tensors in slices: any cut of any shape comes back whole; a layout that does not fit is refused."""

import copy

import pytest
import torch

from fulgurite.checkpoints import DamagedError, load_document, load_tensors, read_manifest, verify
from fulgurite.checkpoints.shards import Place, ShardedTensors, Stored, layout_of, shard_stem
from fulgurite.checkpoints.store import encode, new_manifest, sharded_tensors, write_checkpoint
from fulgurite.checkpoints.tensorfile import write_tensors

GENERATOR = torch.Generator().manual_seed(0)
WHOLE = {
    "even": torch.randn(6, 4, generator=GENERATOR),
    "short": torch.randn(1, 3, generator=GENERATOR),  # fewer rows than ranks
    "uneven": torch.randn(7, generator=GENERATOR),
    "bf16": torch.randn(5, 2, generator=GENERATOR).bfloat16(),
}


def places(tensor, world):
    """Rows as `torch.chunk` deals them out, the last ranks with none; and a grid for the even one."""
    if tuple(tensor.shape) == (6, 4) and world == 4:
        return [(slice(3 * (r // 2), 3 * (r // 2) + 3), slice(2 * (r % 2), 2 * (r % 2) + 2)) for r in range(4)]
    step = -(-len(tensor) // world)
    return [(slice(min(r * step, len(tensor)), min((r + 1) * step, len(tensor))),) for r in range(world)]


def save(path, world):
    ranks, files = [], {}
    for rank in range(world):
        own, mine = {}, {}
        for name, tensor in WHOLE.items():
            where = places(tensor, world)[rank]
            part = tensor[where]
            offset = tuple(w.start for w in where) + (0,) * (tensor.dim() - len(where))
            mine["weights", name] = Place(tuple(tensor.shape), offset, tuple(part.shape))
            own[f"weights/{name}"] = part
        mine["state", "moments"] = mine["weights", "uneven"]
        own["state/moments"] = own["weights/uneven"] * 2
        ranks.append(mine)
        files[shard_stem(rank, world)] = own
    manifest = new_manifest(structure={"shards": layout_of(ranks)})
    states, texts = encode({"weights": {"plain": torch.ones(2)}}, {"state": {"a": torch.zeros(1), "b": [1]}})

    def others(folder):
        written = {f"{stem}.safetensors": own for stem, own in files.items()}
        return {name: write_tensors(folder / name, own) for name, own in written.items()}

    write_checkpoint(path, manifest, states, texts, others=others)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_slices_comes_back_whole(world, tmp_path):
    save(tmp_path / "c", world)
    assert verify(tmp_path / "c").ok
    found = load_tensors(tmp_path / "c")
    assert found.keys() == {"plain", *WHOLE}
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in WHOLE.items())
    some = load_tensors(tmp_path / "c", names=["uneven", "plain"])
    assert list(some) == ["uneven", "plain"]
    assert torch.equal(sharded_tensors(tmp_path / "c", "state")["moments"], WHOLE["uneven"] * 2)
    assert load_document(tmp_path / "c", "state")["b"] == [1]


def test_lazily_nothing_is_read_before_it_is_asked_for(tmp_path):
    save(tmp_path / "c", 2)
    slices = sharded_tensors(tmp_path / "c", "weights")
    (tmp_path / "c" / "shard-00000-of-00002.safetensors").unlink()
    assert set(slices) == set(WHOLE)
    with pytest.raises(Exception, match="shard-00000-of-00002"):
        Stored(slices, "even").load()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda entry: entry.pop("pieces"),
        lambda entry: entry["pieces"].pop(),
        lambda entry: entry["pieces"].__setitem__(1, entry["pieces"][0]),
        lambda entry: entry["pieces"][1].__setitem__("offset", [1, 0]),
        lambda entry: entry["pieces"][1].__setitem__("offset", [3]),
        lambda entry: entry["pieces"][1].__setitem__("offset", [-3, 0]),
        lambda entry: entry["pieces"][1].__setitem__("offset", "ab"),
        lambda entry: entry["pieces"][1].__setitem__("file", "nowhere"),
        lambda entry: entry.__setitem__("shape", [6, 5]),
        lambda entry: entry.__setitem__("shape", None),
    ],
)
def test_a_layout_that_does_not_make_up_the_tensor_is_refused(spoil, tmp_path):
    save(tmp_path / "c", 2)
    manifest = copy.deepcopy(read_manifest(tmp_path / "c"))
    ShardedTensors(manifest, "weights", lambda shard, inside: None)
    spoil(manifest.structure["shards"]["weights"]["even"])
    with pytest.raises(DamagedError, match="'even'"):
        ShardedTensors(manifest, "weights", lambda shard, inside: None)


def test_ranks_that_disagree_or_miss_a_part_are_refused():
    whole = Place((4, 2), (0, 0), (4, 2))
    with pytest.raises(ValueError, match="shapes"):
        layout_of([{("weights", "a"): whole}, {("weights", "a"): Place((5, 2), (4, 0), (1, 2))}])
    with pytest.raises(ValueError, match="hold 4 elements"):
        layout_of([{("weights", "a"): Place((4, 2), (0, 0), (2, 2))}])
