"""The tree of what a checkpoint was made from, with all that can have happened to the parents since."""

import shutil
from pathlib import Path

import pytest
import torch

from fulgurite.checkpoints import MissingError, read_manifest, save_checkpoint_folder, write_bytes
from fulgurite.checkpoints.lineage import lineage, lineage_of, nodes


def made(path, *parents, weights=None, digest=None):
    """A checkpoint made from others; a parent that is no checkpoint has the digest ``d``."""
    recorded = []
    for parent in parents:
        has_manifest = (Path(parent) / "manifest.json").is_file()
        own = read_manifest(parent).digest if has_manifest and digest is None else digest or "d"
        recorded.append({"path": str(parent), "digest": own})
    settings = {"merger": "Average", "weights": weights or [1.0] * len(parents)} if parents else {}
    save_checkpoint_folder(path, {"weights": {"a": torch.ones(2)}}, parents=recorded, settings=settings)


def outline(node):
    return node.path, node.part, node.state, [outline(parent) for parent in node.parents]


@pytest.fixture
def two_levels(tmp_path, monkeypatch):
    """``all`` of base, ``pair`` and ``c``; ``pair`` of ``a`` and ``b``."""
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        made(name)
    write_bytes("base.safetensors", b"")
    made("pair", "a", "b")
    made("all", "base.safetensors", "pair", "c", weights=[0.5, 2.0])


def test_the_tree_of_a_merge_of_merges(two_levels):
    root = lineage("all")
    assert outline(root) == (
        *("all", "", "known"),
        [
            ("base.safetensors", "base", "file", []),
            (
                *("pair", "expert 1, weight 0.5", "known"),
                [("a", "expert 1, weight 1", "known", []), ("b", "expert 2, weight 1", "known", [])],
            ),
            ("c", "expert 2, weight 2", "known", []),
        ],
    )
    assert root.digest == read_manifest("all").digest
    assert lineage_of(root.manifest, "all").digest == ""  # it is not known before the manifest is complete
    assert lineage_of(root.manifest, "all").parents == root.parents
    assert [node.path for node in nodes(root)] == ["all", "base.safetensors", "pair", "a", "b", "c"]
    assert root.parents[1].manifest.settings["merger"] == "Average"


def test_a_parent_of_two_stands_once_in_full(two_levels):
    made("twice", "pair", "pair")
    first, second = lineage("twice").parents
    assert (first.state, second.state) == ("known", "repeated")
    assert second.parents == ()


def test_what_is_not_there_any_more_says_so(two_levels):
    shutil.rmtree("a")
    shutil.rmtree("b")
    made("b")  # another one: it was made later
    Path("c/manifest.json").write_bytes(Path("c/manifest.json").read_bytes().replace(b"self", b"sulf"))
    Path("base.safetensors").unlink()
    assert [(node.path, node.state) for node in nodes(lineage("all"))] == [
        ("all", "known"),
        ("base.safetensors", "missing"),
        ("pair", "known"),
        ("a", "missing"),
        ("b", "changed"),
        ("c", "damaged"),
    ]
    with pytest.raises(MissingError):
        lineage("a")


def test_parents_are_found_beside_the_child_from_another_folder(two_levels, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    states = [node.state for node in nodes(lineage(tmp_path / "all"))]
    assert states == ["known", "file", "known", "known", "known", "known"]


def test_paths_in_a_circle_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made("a")
    made("b", "a")
    made("a", "b")
    assert [node.state for node in nodes(lineage("a"))] == ["known", "known", "changed"]
    made("self", "self")
    assert [node.state for node in nodes(lineage("self"))] == ["known", "changed"]


def test_only_so_many_generations_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made("0")
    for number in range(1, 5):
        made(str(number), str(number - 1))
    assert [node.state for node in nodes(lineage("4", depth=2))] == ["known", "known", "known", "further"]
    assert len(list(nodes(lineage("4")))) == 5
