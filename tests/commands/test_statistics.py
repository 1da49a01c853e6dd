"""``statistics`` of a run, and ``merge --statistics``: the merge that a boundary makes, and what is refused."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from fulgurite.checkpoints import load_tensors, read_manifest, verify
from fulgurite.cli import main
from fulgurite.methods.merging.fisher import Fisher
from fulgurite.methods.merging.regmean import RegMean

DOMAINS = ("red", "green")


@pytest.fixture(scope="module")
def sources(stream_config, tmp_path_factory):
    """Last checkpoints of two runs over all domains at once."""
    root = tmp_path_factory.mktemp("fits")
    short = ("--data.epochs_per_domain", "1", "--data.joint", "true", "--test_after_fit", "false")
    for seed in ("0", "1"):
        named = ("--seed_everything", seed, "--run", str(root / seed))
        assert main(["fit", "--config", str(stream_config), *short, *named]) == 0
    return [root / seed / "checkpoints" / "last" for seed in ("0", "1")]


@pytest.fixture(scope="module")
def measured(sources, tmp_path_factory):
    """Folders of statistics by kind, one per source, each on another domain."""
    root = tmp_path_factory.mktemp("statistics")
    for kind in ("gram", "fisher"):
        for source, domain in zip(sources, DOMAINS):
            few = ("--samples", "5", "--domains", f"[{domain}]", "--out", str(root / f"{kind}-{domain}"))
            assert main(["statistics", str(source), "--kind", kind, *few]) == 0
    return {kind: [root / f"{kind}-{domain}" for domain in DOMAINS] for kind in ("gram", "fisher")}


def merge(merger, sources, statistics, out):
    listed = f"[{', '.join(map(str, sources))}]", f"[{', '.join(map(str, statistics))}]"
    return main(["merge", "--merger", merger, "--sources", listed[0], "--statistics", listed[1], "--out", str(out)])


@pytest.mark.parametrize("merger", [RegMean(), Fisher()], ids=["RegMean", "Fisher"])
def test_files_are_merged_by_what_was_measured_of_them(merger, sources, measured, tmp_path):
    folders = measured[merger.kind]
    assert all(verify(folder).ok for folder in folders)
    for folder, source, domain in zip(folders, sources, DOMAINS):
        manifest = read_manifest(folder)
        assert manifest.parents == [{"path": str(source), "digest": read_manifest(source).digest}]
        assert (manifest.facts["data"]["samples"], manifest.facts["data"]["domains"]) == (5, [domain])
    assert merge(type(merger).__name__, sources, folders, tmp_path / "out") == 0
    states = [load_tensors(source) for source in sources]
    expected = merger.use([load_tensors(folder, "statistics") for folder in folders])(states)
    merged = load_tensors(tmp_path / "out")
    assert all(torch.equal(merged[name], expected[name]) for name in merged.keys() | expected.keys())
    plain = [state["bank.sets.live.video_projection.module.weight"] for state in states]
    live = merged["bank.sets.live.video_projection.module.weight"]
    assert not torch.allclose(live, sum(plain) / 2, rtol=0, atol=1e-6)


def test_bare_files_serve_too(sources, measured, tmp_path):
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for file, folder in zip(files, measured["gram"]):
        save_file({name: tensor.clone() for name, tensor in load_tensors(folder, "statistics").items()}, file)
    assert merge("RegMean", sources, files, tmp_path / "bare") == 0
    assert merge("RegMean", sources, measured["gram"], tmp_path / "folders") == 0
    bare, folders = load_tensors(tmp_path / "bare"), load_tensors(tmp_path / "folders")
    assert all(torch.equal(bare[name], folders[name]) for name in folders)


def test_a_set_of_a_run_is_measured_on_the_domains_of_its_stage(sources, tmp_path):
    argv = ["statistics", str(sources[1].parents[1]), "--kind", "gram", "--samples", "9", "--set", "all"]
    assert main([*argv, "--out", str(tmp_path / "all")]) == 0
    assert set(read_manifest(tmp_path / "all").facts["data"]["domains"]) == {"red", "green", "blue"}
    assert all(name.startswith("bank.sets.all.") for name in load_tensors(tmp_path / "all", "statistics"))


def test_what_does_not_belong_together_is_one_message(sources, measured, tmp_path, capfd):
    out, gram = tmp_path / "out", measured["gram"]
    damaged = tmp_path / "damaged"
    shutil.copytree(gram[0], damaged)
    data = bytearray((damaged / "statistics.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "statistics.safetensors").write_bytes(data)
    wrong = {
        "1 statistics for 2 sources": ("RegMean", gram[:1]),
        "was measured of": ("RegMean", gram[::-1]),
        "holds a gram, and Fisher weighs by a fisher": ("Fisher", gram),
        "holds no statistics": ("RegMean", sources),
        "no statistics at": ("RegMean", [gram[0], tmp_path / "nothing"]),
        "damaged": ("RegMean", [damaged, gram[1]]),
        "Average takes none": ("Average", gram),
    }
    for text, (merger, statistics) in wrong.items():
        assert merge(merger, sources, statistics, out) == 2
        message = capfd.readouterr().err
        assert text in message
        assert message.count("fulgurite merge: ") == 1
        assert not out.exists()
    given = ("--sources", f"[{sources[0]}, {sources[1]}]", "--out", str(out))
    assert main(["merge", "--merger", "RegMean", *given]) == 2
    assert "RegMean needs --statistics, one per source" in capfd.readouterr().err
    many = ["statistics", str(sources[0]), "--kind", "gram", "--out", str(out)]
    assert main(many) == 2
    assert "calibration with 256 of 60 training samples of red, green, blue: choose fewer" in capfd.readouterr().err
    assert main([*many, "--samples", "4", "--set", "purple"]) == 2
    assert "--set purple" in capfd.readouterr().err
    assert main([*many[:-1], str(gram[0])]) == 2
    assert not out.exists()
