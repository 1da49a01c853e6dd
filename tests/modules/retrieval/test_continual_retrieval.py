"""A stream of two domains: a set per stage in both towers, and what each mode mixes of them."""

import functools

import pytest
import torch

from fulgurite.datamodules.continual import ContinualDataModule
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.retrieval.clip4clip import Clip4Clip
from fulgurite.methods.routing.centroid import CentroidRouter
from fulgurite.modules.continual_retrieval import RETRIEVAL_MODES, ContinualRetrieval
from fulgurite.modules.video_text_retrieval import VideoTextRetrieval

ADAPTERS = [Placement(["feed_forward_output"], functools.partial(Bottleneck, reduction=4))]


def stream(data, **options):
    return ContinualDataModule(
        [data(domain="a", batch_size=8), data(domain="b", batch_size=8)], 1, batch_size=8, eval_batch_size=4, **options
    )


@pytest.fixture
def run(backbone, data, trainer):
    def fit(**options):
        torch.manual_seed(0)
        net = ContinualRetrieval(
            backbone(),
            Clip4Clip(max_frames=3, temporal="mean"),
            ADAPTERS,
            optimizer=functools.partial(torch.optim.AdamW, lr=1e-2),
            **options,
        )
        videos = stream(data)
        run = trainer(max_epochs=2, reload_dataloaders_every_n_epochs=1)
        run.fit(net, datamodule=videos)
        return net.eval(), videos, run

    return fit


def embedded(net, batch, name):
    """Video and sentence features with one set throughout."""
    with torch.no_grad(), net.bank.use(name):
        texts, videos = net.embed(batch)
    return texts.sentence, videos.video


def test_missing_frames_do_not_route(backbone, data):
    net = ContinualRetrieval(backbone(), Clip4Clip(max_frames=3, temporal="mean"), ADAPTERS)
    batch = net.collator("test")(stream(data).samples("test")[:2])
    batch["frame_mask"][1, 2] = False
    batch["pixels"][1, 2] = 0
    with torch.no_grad():
        found = net.routing_of_videos(batch)
        frames = net.backbone.video_tokens(batch).tokens[:, :, 0]
    torch.testing.assert_close(found, torch.stack([frames[0].mean(0), frames[1, :2].mean(0)]))


def test_repeats_teach_no_router(run, monkeypatch):
    net, videos, _ = run()
    batch = net.collator("fit")(videos.samples("test")[:3])
    batch["counted"][1] = False
    seen = {}
    monkeypatch.setattr(ContinualRetrieval, "in_first_epoch", True)
    monkeypatch.setattr(net, "teach", lambda routers, parts, counted: seen.update({routers[0]: counted}))
    monkeypatch.setattr(VideoTextRetrieval, "training_step", lambda *args: None)
    net.training_step(batch, 0)
    assert torch.equal(seen[net.video_router], torch.tensor([True, False, True]))
    assert torch.equal(seen[net.router], batch["owner"] != 1)


def test_modes_use_the_sets_that_they_name(run):
    net, videos, _ = run()
    assert set(net.bank.names) == {"live", "initial", "a", "b"}
    batch = net.collator("test")([*videos.samples("test")[:2], *videos.samples("test")[-2:]])
    assert batch["domain"] == ["a", "a", "b", "b"]
    with torch.no_grad():
        found = net.embed_in(["oracle", "last", "zero_shot", "average"], batch)
    by_set = {name: embedded(net, batch, name) for name in ("initial", "a", "b")}
    assert not torch.allclose(by_set["a"][1], by_set["b"][1], atol=1e-4)
    of_b = torch.tensor([domain == "b" for domain in batch["domain"]])
    for part, own in ((0, of_b[batch["owner"]]), (1, of_b)):
        pick = lambda each, part=part: (each[0].sentence, each[1].video)[part]  # noqa: E731
        expected = torch.where(own[:, None], by_set["b"][part], by_set["a"][part])
        torch.testing.assert_close(pick(found["oracle"]), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(pick(found["last"]), by_set["b"][part], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(pick(found["zero_shot"]), by_set["initial"][part], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for of, a, b in zip(*(net.bank.parameters_of(name) for name in ("initial", "a", "b"))):
            of.copy_((a + b) / 2)
    mean = embedded(net, batch, "initial")
    torch.testing.assert_close(found["average"][0].sentence, mean[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["average"][1].video, mean[1], rtol=1e-5, atol=1e-6)


def test_within_a_stream_the_stages_trained_so_far_are_used(run):
    net, videos, _ = run(mode="last")
    captions = net.backbone.caption_batch(videos.samples("test")[0].captions)
    found = {}
    for stage in (0, 1):
        net.stage = stage
        with torch.no_grad():
            found[stage] = net.weights_of(net.router, net.routing_of_captions(captions))[0]
    assert found[0].tolist() == [0, 1, 0]
    assert found[1].tolist() == [0, 0, 1]


def test_each_tower_has_its_own_router(run, monkeypatch):
    net, videos, _ = run()
    batch = net.collator("test")(videos.samples("test")[:3])
    for router, column in ((net.router, 0), (net.video_router, 1)):
        one_hot = torch.eye(2)[column]
        monkeypatch.setattr(router, "forward", lambda features, one_hot=one_hot, **_: one_hot.expand(len(features), 2))
    with torch.no_grad():
        texts, found = net.embed_in(["router"], batch)["router"]
    torch.testing.assert_close(texts.sentence, embedded(net, batch, "a")[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.video, embedded(net, batch, "b")[1], rtol=1e-5, atol=1e-6)


def test_routers_learn_the_mean_frozen_feature_of_every_domain(run):
    net, videos, _ = run()
    collator = net.collator("fit")
    with torch.no_grad():
        parts = [net.routing(collator([sample])) for sample in videos.samples("train") if sample.domain == "b"]
    for router, index in ((net.router, 0), (net.video_router, 1)):
        expected = torch.cat([part[index] for part in parts]).double()
        assert router.counts.tolist() == [len(parts), len(parts)]
        torch.testing.assert_close(router.sums[1], expected.sum(0), rtol=1e-5, atol=1e-5)


def test_a_test_compares_all_modes_and_a_checkpoint_brings_them_back(run, data, trainer, backbone):
    net, _, trained = run(router=CentroidRouter(top_k=1))
    videos = stream(data)
    trained.test(net, datamodule=videos, verbose=False)
    assert len(net.test_results["variants"]) == len(RETRIEVAL_MODES)
    assert net.test_results["domains"] == ["a", "b"]
    checkpoint = {}
    net.on_save_checkpoint(checkpoint)
    other = ContinualRetrieval(backbone(), Clip4Clip(max_frames=3, temporal="mean"), ADAPTERS)
    other.restore(checkpoint["fulgurite"])
    other.load_state_dict(net.state_dict())
    trainer().test(other, datamodule=stream(data), verbose=False)
    assert other.test_results["variants"] == net.test_results["variants"]


def test_modes_that_do_not_exist_are_refused(backbone):
    with pytest.raises(ValueError, match="second_router"):
        ContinualRetrieval(backbone(), Clip4Clip(temporal="mean"), ADAPTERS, modes=["dynamic", "second_router"])
