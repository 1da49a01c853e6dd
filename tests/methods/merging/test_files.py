"""Merging files gives the bits of merging in memory, whatever form the sources have, and leaves all or nothing."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from fulgurite.checkpoints import (
    DamagedError,
    MissingError,
    RefusedError,
    load_tensors,
    read_manifest,
    save_checkpoint_folder,
    verify,
)
from fulgurite.checkpoints.sources import open_source
from fulgurite.methods.merging import job, writing
from fulgurite.methods.merging.base import Merger
from fulgurite.methods.merging.files import merge_files
from fulgurite.methods.merging.job import default_threads
from fulgurite.methods.merging.linear import Average, TaskArithmetic
from fulgurite.methods.merging.model_stock import ModelStock
from fulgurite.methods.merging.opcm import Opcm
from fulgurite.methods.merging.plan import Matching
from fulgurite.methods.merging.slerp import Slerp
from fulgurite.methods.merging.ties import Ties


class Whole(Merger):
    """Takes tensors whole, after a pass: the mean, scaled by the largest entry of all models."""

    needs_base = False

    def begin(self, plan):
        super().begin(plan)
        return "largest"

    def scan(self, name, base, experts):
        return max(float(expert.abs().max()) for expert in experts)

    def combine(self, summary, other):
        return max(summary, other)

    def settle(self, summary):
        self.scanned["largest"] = summary

    def merge_tensor(self, name, base, experts, weights):
        return torch.stack(list(experts)).mean(0) / self.scanned["largest"]


@pytest.fixture
def paths(base, experts, tmp_path):
    """Base as one file, experts as a checkpoint, a folder with an index of two shards, and a Hugging Face folder."""
    save_file(base, tmp_path / "base.safetensors")
    save_checkpoint_folder(tmp_path / "a", {"weights": experts[0]})
    names, index = list(experts[1]), {}
    (tmp_path / "b").mkdir()
    for part, chosen in enumerate((names[:5], names[5:])):
        file = f"model-{part + 1:05d}-of-00002.safetensors"
        save_file({n: experts[1][n] for n in chosen}, tmp_path / "b" / file)
        index |= dict.fromkeys(chosen, file)
    (tmp_path / "b" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (tmp_path / "c").mkdir()
    save_file(experts[2], tmp_path / "c" / "model.safetensors")
    return tmp_path / "base.safetensors", [tmp_path / name for name in "abc"]


@pytest.mark.parametrize(
    "merger",
    [Average(), TaskArithmetic(0.4), Ties(0.3), Slerp(), ModelStock(), Whole()],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("threads", [1, 3])
def test_files_and_memory_give_the_same_bits(merger, threads, paths, base, experts, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "piece_size", lambda *_: 7)  # pieces inside tensors, with a rest
    given = base if merger.needs_base else None
    number = 2 if isinstance(merger, Slerp) else 3
    weights = None if isinstance(merger, ModelStock) else [1.0, 2.0, 0.5][:number]
    expected = merger(experts[:number], given, weights)
    sources = paths[1][:number]
    done = merge_files(sources, tmp_path / "out", merger, given and paths[0], weights, threads=threads)
    assert verify(tmp_path / "out").ok
    found = load_tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in expected.items())
    reference = experts[0] if given is None else base
    change = (expected["embed.weight"] - reference["embed.weight"]).norm() / reference["embed.weight"].norm()
    assert done.change["embed.weight"] == pytest.approx(change.item(), rel=1e-4)
    manifest = read_manifest(tmp_path / "out")
    assert [parent["path"] for parent in manifest.parents][-number:] == [str(p) for p in sources]
    assert manifest.parents[-number]["digest"] == read_manifest(paths[1][0]).digest
    assert manifest.settings["merger"] == type(merger).__name__


@pytest.mark.parametrize(
    "merger",
    [Average(), Ties(0.3), Ties(0.3, dialect="official"), Opcm()],
    ids=["average", "ties", "ties official", "opcm"],
)
def test_ranks_that_share_the_work_write_the_same_bits(merger, paths, tmp_path, on_ranks):
    given = paths[0] if merger.needs_base else None
    merge_files(paths[1], tmp_path / "one", merger, given)
    done = on_ranks(
        2, lambda ranks: merge_files(paths[1], tmp_path / "two", copy.deepcopy(merger), given, threads=1, ranks=ranks)
    )
    assert done[0].change == done[1].change
    assert verify(tmp_path / "two").ok
    one, two = load_tensors(tmp_path / "one"), load_tensors(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert read_manifest(tmp_path / "one").facts["change"] == read_manifest(tmp_path / "two").facts["change"]


def test_ranks_write_shards_of_another_librarys_folder(paths, experts, tmp_path, on_ranks):
    for path in paths[1][1:]:
        (path / "config.json").write_text('{"model_type": "mine"}')
    given = {"like": None, "max_shard_bytes": 200}
    on_ranks(2, lambda ranks: merge_files(paths[1][1:], tmp_path / "two", Average(), threads=1, ranks=ranks, **given))
    assert verify(tmp_path / "two").ok
    files = sorted((tmp_path / "two").glob("model-*.safetensors"))
    assert len(files) > 3
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = Average()(experts[1:])
    assert found.keys() == expected.keys() == open_source(tmp_path / "two").tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("place", ["source", "pass", "merge", "out"])
def test_where_one_rank_fails_all_raise_and_nothing_is_left(place, paths, experts, tmp_path, on_ranks):
    save_file({**experts[0], "scale": torch.tensor(float("nan"))}, tmp_path / "nan.safetensors")
    merger = Opcm() if place == "pass" else TaskArithmetic()
    sources = [tmp_path / "nan.safetensors" if place in ("pass", "merge") else paths[1][0], paths[1][1]]
    out = tmp_path / "file" / "out" if place == "out" else tmp_path / "out"
    (tmp_path / "file").write_text("in the way")
    before = {p.name for p in tmp_path.iterdir()}

    def work(ranks):
        own = [tmp_path / "nowhere", *sources[1:]] if place == "source" and ranks.rank == 1 else sources
        return merge_files(own, out, copy.deepcopy(merger), paths[0], threads=1, ranks=ranks)

    failed = on_ranks(2, work)
    said = {"source": "nowhere", "out": "file"}.get(place, r"holds NaN in scale")
    assert all(isinstance(error, Exception) and re.search(said, str(error)) for error in failed)
    assert leftovers(tmp_path, before) == []


def test_a_merger_of_whole_tensors_holds_one_of_each_source(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert [default_threads(merger) for merger in (Average(), Ties(), Opcm(), Whole())] == [8, 8, 1, 1]


def test_any_reader_of_safetensors_opens_the_result_and_an_artefact_is_a_source(paths, tmp_path):
    merge_files(paths[1], tmp_path / "out", Average())
    assert load_file(tmp_path / "out" / "weights.safetensors")["scale"].shape == ()
    merge_files([tmp_path / "out", paths[1][0]], tmp_path / "again", Average())
    assert read_manifest(tmp_path / "again").parents[0]["digest"] == read_manifest(tmp_path / "out").digest


def test_the_type_is_the_references_or_the_one_asked_for(experts, tmp_path):
    for i, expert in enumerate(experts):
        half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in expert.items()}
        save_file(half, tmp_path / f"{i}.safetensors")
    sources = [tmp_path / f"{i}.safetensors" for i in range(3)]
    merge_files(sources, tmp_path / "low", Average())
    merge_files(sources, tmp_path / "high", Average(), dtype=torch.float32)
    low, high = load_tensors(tmp_path / "low"), load_tensors(tmp_path / "high")
    assert low["embed.weight"].dtype == torch.bfloat16
    assert torch.equal(low["embed.weight"], high["embed.weight"].bfloat16())
    assert high["position_ids"].dtype == torch.int64


def test_common_rows(paths, experts, tmp_path):
    short = {**experts[2], "embed.weight": experts[2]["embed.weight"][:5].clone()}
    save_file(short, tmp_path / "short.safetensors")
    sources = [paths[1][0], tmp_path / "short.safetensors"]
    with pytest.raises(ValueError, match="common"):
        merge_files(sources, tmp_path / "out", Average())
    merge_files(sources, tmp_path / "out", Average(), matching=Matching(rows="common"))
    assert read_manifest(tmp_path / "out").settings["matching"] == {"strict": True, "rows": "common", "donor": None}
    found = load_tensors(tmp_path / "out")["embed.weight"]
    torch.testing.assert_close(found, (experts[0]["embed.weight"][:5] + short["embed.weight"]) / 2)


def leftovers(folder, before):
    return sorted(p.name for p in folder.iterdir() if p.name not in before)


def test_what_is_refused_leaves_nothing(paths, experts, tmp_path):
    save_file({**experts[0], "scale": torch.tensor(float("nan"))}, tmp_path / "nan.safetensors")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "note.txt").write_text("mine")
    before = {p.name for p in tmp_path.iterdir()}
    a = paths[1][0]
    cases = [
        (
            [a, tmp_path / "nan.safetensors"],
            tmp_path / "out",
            ValueError,
            r"expert 1 \(.*nan.safetensors\) holds NaN in scale",
        ),
        ([a, tmp_path / "nowhere"], tmp_path / "out", MissingError, "nowhere"),
        ([a, tmp_path / "pickle"], tmp_path / "out", RefusedError, "pickle"),
        ([a, paths[1][1]], tmp_path / "there", RefusedError, "nothing is replaced"),
        ([a, a], tmp_path / "out", RefusedError, r"equals expert 0 \(.*\) and expert 1"),
    ]
    for sources, out, error, said in cases:
        with pytest.raises(error, match=said):
            merge_files(sources, out, Average())
    with pytest.raises(ValueError, match="threads=0: give at least 1"):
        merge_files([a, paths[1][1]], tmp_path / "out", Average(), threads=0)
    assert leftovers(tmp_path, before) == []


def test_damaged_sources_are_named(paths, tmp_path):
    file = paths[1][0] / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedError, match=r"weights\.safetensors"):
        merge_files(paths[1], tmp_path / "out", Average())
    (paths[1][1] / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingError, match="model-00002-of-00002"):
        merge_files(paths[1][1:], tmp_path / "out", Average())
    (tmp_path / "base.safetensors").write_bytes(b"short")
    with pytest.raises(DamagedError, match=r"base\.safetensors"):
        merge_files(paths[1][2:], tmp_path / "out", TaskArithmetic(1.0), base=paths[0])


def test_a_file_that_does_not_hold_what_was_written_is_not_published(paths, tmp_path, monkeypatch):
    own = writing.fill

    def careless(path, *more):
        own(path, *more)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(writing, "fill", careless)
    with pytest.raises(DamagedError, match="was written as"):
        merge_files(paths[1], tmp_path / "out", Average())
    assert not (tmp_path / "out").exists()


def test_one_expert_comes_back_and_is_no_mistake(paths, experts, tmp_path):
    done = merge_files(paths[1][:1], tmp_path / "out", Average())
    found = load_tensors(tmp_path / "out")
    assert all(torch.equal(found[n], t) for n, t in experts[0].items())
    assert done.equal_to == [f"expert 0 ({paths[1][0]})"]


def test_a_merge_that_is_no_number_is_not_published(tmp_path):
    base, tuned = (
        {"mask": torch.tensor([0.0, -torch.inf]), "weight": torch.full((3,), value)} for value in (0.0, 60000.0)
    )
    for name, model in (("start", base), ("one", tuned), ("two", {**tuned, "weight": tuned["weight"] / 2})):
        save_file(model, tmp_path / f"{name}.safetensors")
    start, one, two = (tmp_path / f"{name}.safetensors" for name in ("start", "one", "two"))
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"makes NaN of mask, of infinite entries in the base \(.*start"):
        merge_files([one, two], tmp_path / "out", TaskArithmetic(1.0), start)
    with pytest.raises(ValueError, match=r"weight: a merged value of 9e\+04 is too large for float16: set dtype"):
        merge_files([one, two], tmp_path / "out", Average(normalize=False), dtype=torch.float16)
    assert leftovers(tmp_path, before) == []
    merge_files([one, two], tmp_path / "out", Average(), dtype=torch.float16)
    assert load_tensors(tmp_path / "out")["mask"].tolist() == [0.0, -torch.inf]
