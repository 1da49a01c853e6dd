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
    data = SixDomains(root, Path("all.json"), ["tgif", "msvd"], held_out=0.25, epochs_per_domain=[3, 2], **options)
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
    assert [d.dataset for d in SixDomains(tmp_path).domains] == [
        "ivqa",
        "msvd",
        "msrvtt",
        "lsmdc",
        "activitynet",
        "tgif",
    ]
    with pytest.raises(DataError, match=r"\['how2qa'\].*'tgif'"):
        SixDomains(tmp_path, datasets=["how2qa"])
