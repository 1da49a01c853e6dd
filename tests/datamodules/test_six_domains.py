from pathlib import Path

import pytest

from fulgurite.datamodules.six_domains import SixDomains
from fulgurite.datamodules.video_qa import LAYOUTS
from fulgurite.samples import DataError


@pytest.fixture
def root(official):
    for name in ("msvd", "tgif"):
        layout = LAYOUTS[name]
        rows = [{"video_id": f"v{i}", "question": "what", "answer": "cat", "type": "0"} for i in range(4)]
        files = {file: rows for file in (layout.train, layout.val, layout.test) if file is not None}
        root = official(layout.folder, files)
    (root / "all.json").write_text('["cat", "dog"]')
    return root


def test_one_stage_per_set_in_the_given_order_over_one_vocabulary(root):
    options = {"features_file": None, "videos": Path("videos"), "subtitles": None}
    data = SixDomains(["tgif", "msvd"], Path("all.json"), [3, 2], root=root, held_out=0.25, **options)
    assert data.info().domains == ("tgif", "msvd")
    assert data.info().answers == ("cat", "dog")
    assert [(s.name, s.epochs) for s in data.stages()] == [("tgif", 3), ("msvd", 2)]
    assert len([s for s in data.samples("val") if s.domain == "tgif"]) == 1
    assert data.samples("test")[0].video.path == root / "TGIF-QA" / "videos" / "v0.mp4"
    assert data.trainer_options() == {
        "max_epochs": 5,
        "reload_dataloaders_every_n_epochs": 1,
        "use_distributed_sampler": False,
    }


def test_the_published_order_is_the_default_and_unknown_sets_are_named(tmp_path):
    assert [d.dataset for d in SixDomains(root=tmp_path).domains] == [
        "ivqa",
        "msvd",
        "msrvtt",
        "lsmdc",
        "activitynet",
        "tgif",
    ]
    with pytest.raises(DataError, match=r"\['how2qa'\].*'tgif'"):
        SixDomains(["how2qa"], root=tmp_path)
    with pytest.raises(DataError, match=r"datasets is empty"):
        SixDomains([], root=tmp_path)


def test_loading_options_reach_the_stream_and_its_sets(tmp_path):
    options = {"batch_size": 6, "num_workers": 1, "seed": 3, "on_bad": "skip", "feature_dtype": "float32"}
    data = SixDomains(root=tmp_path, feature_cache=tmp_path / "cache", **options)
    for each in (data, *data.domains):
        assert {name: getattr(each, name) for name in options} == options
        assert each.feature_cache == tmp_path / "cache"
