"""What trains, what an evaluation counts, and what a checkpoint brings back."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fulgurite.callbacks.init_from import InitialWeights
from fulgurite.callbacks.run_folder import RunFolder
from fulgurite.checkpoints import MismatchError, save_checkpoint_folder
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.optimizers.bert_adam import BertAdam
from fulgurite.methods.retrieval.clip4clip import Clip4Clip
from fulgurite.methods.retrieval.dual_softmax import DualSoftmax
from fulgurite.methods.retrieval.query_bank import QueryBank
from fulgurite.methods.retrieval.sinkhorn import Sinkhorn
from fulgurite.methods.retrieval.ucofia import Ucofia
from fulgurite.modules.optimization import ParamGroup
from fulgurite.samples import DataError, Stage, Video

ADAPTERS = [Placement(["feed_forward_output"], functools.partial(Bottleneck, reduction=4))]


def fitted(module, data, trainer, **options):
    run = trainer(**options)
    run.fit(module, datamodule=data)
    return run


def whole_scores(module, samples):
    """(L, T, V) scores of all texts and videos, encoded one video at a time, and the owner of each text."""
    collator = module.collator("test")
    with torch.no_grad():
        parts = [module.embed(collator([sample])) for sample in samples]
        texts = type(parts[0][0]).cat([part[0] for part in parts])
        videos = type(parts[0][1]).cat([part[1] for part in parts])
        owner = [i for i, sample in enumerate(samples) for _ in sample.captions]
        return module.levels_of(texts, videos), np.array(owner)


def plain_recalls(scores, owner):
    """Text to video over all texts; video to text by each video's best sentence, by sorting."""
    forward = [1 + int(np.flatnonzero(np.argsort(-row) == owner[i])[0]) for i, row in enumerate(scores)]
    best = np.stack([scores[owner == video].max(0) for video in range(scores.shape[1])])
    backward = [1 + int(np.flatnonzero(np.argsort(-best[:, v]) == v)[0]) for v in range(len(best))]
    out = {}
    for name, ranks in (("text_to_video", forward), ("video_to_text", backward)):
        ranks = np.array(ranks)
        out |= {f"{name}/R@{k}": 100 * (ranks <= k).mean() for k in (1, 5)}
        out |= {f"{name}/MdR": np.median(ranks), f"{name}/MnR": ranks.mean()}
    return out


def close(found, expected):
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_a_test_counts_what_sorting_the_whole_matrix_gives(module, data, trainer):
    net, videos = module(), data()
    trainer().test(net, datamodule=videos, verbose=False)
    scores, owner = whole_scores(net.eval(), videos.samples("test"))
    variants = net.test_results["variants"]
    for n, name in enumerate(variants, start=1):
        close(variants[name], plain_recalls(scores[:n].mean(0).numpy(), owner))
    assert list(variants)[-1] == "video_sentence+frame_sentence+patch_word"
    rank = {row["caption"]: row["rank"] for row in net.test_answers}
    assert len(rank) == len(owner)
    order = scores.mean(0).argsort(1, descending=True)
    captions = [caption for sample in videos.samples("test") for caption in sample.captions]
    for text, caption in enumerate(captions):
        assert rank[caption] == 1 + order[text].tolist().index(owner[text])


@pytest.mark.parametrize("normalizer", [Sinkhorn(), DualSoftmax(), QueryBank(dynamic=False)])
def test_a_normalised_test_is_that_of_the_whole_matrices(normalizer, module, data, trainer):
    net, videos = module(normalizer=normalizer, bank_texts=9, bank_videos=5), data()
    trainer().test(net, datamodule=videos, verbose=False)
    scores, owner = whole_scores(net.eval(), videos.samples("test"))
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0)).tolist()
    drawn = [videos.samples("train")[i] for i in order]
    bank, _ = whole_scores(net, [*videos.samples("test"), *drawn])
    tests, texts = scores.shape[2], len(owner)
    unique = list({sample.video: i for i, sample in reversed(list(enumerate(drawn)))}.values())
    first = sorted(unique)[:5]  # the first of each video in the order of the draw
    if normalizer.mode == "transductive":
        forward, backward = scores, scores.mT
    else:
        forward = bank[:, texts : texts + 9, :tests]
        backward = bank[:, :texts, [tests + i for i in first]].mT
    t2v = normalizer.apply(scores, normalizer.fit(lambda: [forward])).numpy()
    v2t = normalizer.apply(scores.mT, normalizer.fit(lambda: [backward])).T.numpy()
    found = net.test_results["variants"]["video_sentence+frame_sentence+patch_word+normalized"]
    close(found, {k: v for k, v in plain_recalls(t2v, owner).items() if k.startswith("text")})
    close(found, {k: v for k, v in plain_recalls(v2t, owner).items() if k.startswith("video")})


def test_blocks_of_any_size_rank_alike(module, data, trainer, monkeypatch):
    import fulgurite.modules.retrieval_evaluation as evaluation

    net, figures = module(normalizer=Sinkhorn(), bank_texts=9, bank_videos=5), []
    for texts, videos, own, kept in ((256, 256, 8, 1 << 30), (2, 3, 1, 0)):
        for name, value in (("TEXTS", texts), ("VIDEOS", videos), ("OWN", own), ("KEPT", kept)):
            monkeypatch.setattr(evaluation, name, value)
        trainer().test(net, datamodule=data(), verbose=False)
        figures.append(net.test_results["variants"])
    assert figures[0] == figures[1]


def test_two_tests_and_a_loaded_model_give_the_same_bits(module, data, trainer):
    net, videos = module(), data()
    fitted(net, videos, trainer)
    samples = videos.samples("val")
    once, _ = whole_scores(net.eval(), samples)
    again, _ = whole_scores(net, samples)
    assert torch.equal(once, again)
    checkpoint = {}
    net.on_save_checkpoint(checkpoint)
    other = module(lr=1.0)
    other.restore(checkpoint["fulgurite"])
    other.load_state_dict(net.state_dict())
    assert torch.equal(whole_scores(other.eval(), samples)[0], once)


def test_without_adapters_all_but_the_published_frozen_parts_train(module, data, trainer):
    net = module()
    before = {name: value.clone() for name, value in net.named_parameters()}
    fitted(net, data(), trainer, max_epochs=2)
    changed = {name for name, value in net.named_parameters() if not torch.equal(value, before[name])}
    assert changed == set(net.trained())
    frozen = {name.removeprefix("backbone.model.") for name in before.keys() - changed}
    assert frozen == {
        "logit_scale",
        "token_embedding.weight",
        "positional_embedding",
        "visual.positional_embedding",
        "visual.class_embedding",
        "visual.conv1.weight",
        "visual.ln_pre.weight",
        "visual.ln_pre.bias",
    }
    assert any(name.startswith("backbone.") for name in net.state_dict())


def test_with_adapters_the_towers_stay_and_are_no_part_of_the_file(module, data, trainer):
    net = module(ADAPTERS, backbone=None)
    before = {name: value.clone() for name, value in net.backbone.named_parameters()}
    fitted(net, data(), trainer)
    assert all(torch.equal(value, before[name]) for name, value in net.backbone.named_parameters())
    assert not any(name.startswith("backbone.") for name in net.state_dict())
    assert {name.split(".")[0] for name in net.state_dict()} == {"bank", "head"}
    assert not torch.equal(net.head.word_projection, module(ADAPTERS).head.word_projection)


def test_training_compares_by_the_mean_of_the_levels(module, data, trainer):
    net = module(
        head=Ucofia(max_frames=3, max_words=12, temporal_layers=1, levels=("video_sentence", "frame_sentence"))
    )
    videos = data()
    fitted(net, videos, trainer, max_steps=1)
    samples = videos.samples("train")[:4]
    with torch.no_grad():
        found = net.eval()(net.collator("fit")(samples))
    levels, _ = whole_scores(net, samples)
    torch.testing.assert_close(found, (levels[0] + levels[1]) / 2, rtol=1e-5, atol=1e-5)


def test_a_start_of_other_lengths_names_the_option_to_change(module, data, trainer, tmp_path):
    longer = module(head=Ucofia(max_frames=5, max_words=12, temporal_layers=1))
    longer.prepare(data().info(), [Stage("all", ("d",), 1, 1)])
    saved = tmp_path / "start"
    checkpoint = {}
    longer.on_save_checkpoint(checkpoint)
    facts = checkpoint["fulgurite"]
    kept = {"kind": facts.pop("kind"), "base": facts.pop("base"), "facts": facts}
    save_checkpoint_folder(saved, {"weights": longer.state_dict()}, **kept)
    with pytest.raises(MismatchError, match=r"head\.frame_matrix\.weight: file \(5, 5\), module \(3, 3\)") as error:
        trainer(callbacks=[InitialWeights(saved)]).fit(module(), datamodule=data())
    assert "model.init_args.head" in str(error.value)


def test_rates_and_decay_belong_to_groups_of_names(module, data, trainer):
    groups = [
        ParamGroup(r"^backbone\..*bias", 1e-7, 0.0),
        ParamGroup(r"^backbone\.", 1e-7),
        ParamGroup(r"bias", weight_decay=0.0),
    ]
    net = module(optimizer=functools.partial(BertAdam, weight_decay=0.2), param_groups=groups)
    run = fitted(net, data(), trainer)
    found = [(group["initial_lr"], group["weight_decay"]) for group in run.optimizers[0].param_groups]
    assert found == [(1e-7, 0.0), (1e-7, 0.2), (1e-3, 0.0), (1e-3, 0.2)]


def test_the_scale_stays_below_its_limit(module, data, trainer):
    net = module(lr=0.5)
    with torch.no_grad():
        net.head.logit_scale.fill_(4.6)
        net.head.logit_scale.register_hook(lambda grad: -torch.ones_like(grad))
    fitted(net, data(), trainer)
    assert net.head.logit_scale.exp().item() == pytest.approx(100.0)


def test_what_is_drawn_depends_on_step_and_sample_alone(module, data, trainer):
    net, videos = module(), data()
    trainer(limit_train_batches=1).fit(net, datamodule=videos)
    batch = net.collator("fit")(videos.samples("train")[:4])
    turned = net.collator("fit")(videos.samples("train")[:4][::-1])
    assert net.seeds(batch) == net.seeds(turned)[::-1]
    assert len(set(net.seeds(batch))) == 4
    now = net.seeds(batch)
    net.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed += 1
    net.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed += 1
    assert net.seeds(batch) != now


def test_other_heads_take_the_place_by_one_line(module, data, trainer):
    net = module(head=Clip4Clip(max_frames=3, temporal="mean"))
    trainer().fit(net, datamodule=data())
    assert list(net.head.levels) == ["video_sentence"]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"adapters": []}, ValueError, "adapters is empty"),
        ({"adapters": ADAPTERS, "frozen": ["x"]}, ValueError, "frozen is for training the backbone"),
        ({"frozen": ["nowhere"]}, LookupError, "nowhere"),
        ({"head": Clip4Clip(max_frames=2, temporal="mean")}, ValueError, "gives 3 frames, and the head is made for at"),
        (
            {"head": Ucofia(max_frames=3, max_words=9)},
            ValueError,
            "gives 12 words, .* raise .*head.init_args.max_words",
        ),
        ({"bank_videos": 0}, ValueError, "bank_videos=0 must be at least 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, error, match, module):
    with pytest.raises(error, match=match):
        module(**options)


def test_a_dynamic_query_bank_cannot_normalise_captions(module, data, trainer):
    with pytest.raises(ValueError, match="dynamic"):
        module(normalizer=QueryBank(), bank_texts=4, bank_videos=2)
    net = module(normalizer=QueryBank(), bank_texts=4, normalize=["text_to_video"])
    trainer().test(net, datamodule=data(), verbose=False)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_bank_is_embedded_in_the_precision_of_the_test(precision, module, data, trainer):
    net, seen = module(normalizer=Sinkhorn(), bank_texts=4, bank_videos=2), []
    inner = net.backbone.video_tokens

    def noted(batch):
        seen.append((torch.is_autocast_enabled("cpu"), batch["pixels"].dtype))
        return inner(batch)

    net.backbone.video_tokens = noted
    trainer(precision=precision).test(net, datamodule=data(), verbose=False)
    assert len(seen) == 3  # of the bank, and of the two batches of the test
    assert len(set(seen)) == 1


def test_a_test_after_a_fit_and_one_by_itself_have_one_bank(module, data, trainer, tmp_path):
    """Also where the fit left videos out that cannot be read."""
    videos = data()
    net = module(normalizer=Sinkhorn(), bank_texts=9, bank_videos=5)
    run = fitted(net, videos, trainer)
    run.test(net, datamodule=videos, verbose=False)
    after = net.test_results["variants"]
    trainer().test(net, datamodule=data(), verbose=False)
    assert net.test_results["variants"] == after


def test_captions_of_equal_scores_share_their_ranks(module, data, trainer, monkeypatch):
    """Two videos that are the same file, with the same caption: each ranks 1.5, whatever the blocks."""
    import fulgurite.modules.retrieval_evaluation as evaluation

    net, videos = module(), data()
    doubled = [replace(sample, id=f"{sample.id} {i}") for sample in videos.samples("test") for i in range(2)]
    videos.read = lambda split: doubled
    videos._splits.clear()
    for own, texts in ((8, 256), (1, 3)):
        monkeypatch.setattr(evaluation, "OWN", own)
        monkeypatch.setattr(evaluation, "TEXTS", texts)
        trainer().test(net, datamodule=videos, verbose=False)
        assert all(row["rank"] % 1 == 0.5 for row in net.test_answers)
        for way in ("text_to_video", "video_to_text"):
            figures = net.test_results["variants"]["video_sentence+frame_sentence+patch_word"]
            assert figures[f"{way}/R@1"] == 0
            assert (2 * figures[f"{way}/MdR"]) % 2 == 1


def test_batches_of_other_lengths_are_padded_where_masks_tell(module, data, trainer, backbone):
    options = {"max_frames": 3, "max_words": 12, "temporal_layers": 1}
    tower = backbone(pad_to="longest")
    net, videos = module(head=Ucofia(**options, mask_padding=True), backbone=tower), data()
    videos.eval_batch_size = 1
    trainer().test(net, datamodule=videos, verbose=False)
    scores, owner = whole_scores(net.eval(), videos.samples("test"))
    close(list(net.test_results["variants"].values())[-1], plain_recalls(scores.mean(0).numpy(), owner))
    net = module(head=Ucofia(**options), backbone=backbone(pad_to="longest"))
    with pytest.raises(ValueError, match=r"mask_padding to true, or one length for all"):
        trainer().test(net, datamodule=videos, verbose=False)


def test_a_caption_that_is_too_long_is_found_before_anything_else(module, data, trainer, backbone):
    head = Ucofia(max_frames=3, max_words=12, temporal_layers=1)
    with pytest.raises(DataError, match=r"sample 'videos/train0\.mp4/0' has \d+ tokens.*long_captions to cut"):
        trainer().fit(module(head=head, backbone=backbone(max_words=5)), datamodule=data())


def test_cut_captions_of_repeats_are_not_counted_again(module, monkeypatch):
    net, logged = module(), {}
    monkeypatch.setattr(net, "log", lambda name, value, **_: logged.update({name: float(value)}))
    batch = {
        "cut": torch.tensor([True, True, False, True]),
        "owner": torch.tensor([0, 0, 1, 2]),
        "counted": torch.tensor([True, True, False]),
    }
    net.count_cut("val", batch)
    assert logged == {"val/cut_captions": 2.0}


def test_a_bank_needs_training_captions(module, data, trainer):
    with pytest.raises(DataError, match="training split"):
        trainer().test(module(normalizer=Sinkhorn()), datamodule=data(train=None), verbose=False)


def test_predictions_are_the_best_videos_of_each_caption(module, data, trainer, tmp_path):
    net, videos = module(), data()
    folder = RunFolder(tmp_path, "model: {}\n")
    trainer(callbacks=[folder]).predict(net, datamodule=videos)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    samples = videos.samples("predict")
    scores, _ = whole_scores(net.eval(), samples)
    assert [row["caption"] for row in rows] == [caption for sample in samples for caption in sample.captions]
    best = scores.mean(0).topk(5)
    for row, indices, values in zip(rows, best.indices.tolist(), best.values.tolist()):
        assert [hit["id"] for hit in row["top"]] == [samples[i].id for i in indices]
        assert [hit["score"] for hit in row["top"]] == pytest.approx(values, abs=1e-3)


def test_a_cache_of_frames_reads_each_video_once_for_towers_that_train(module, data, trainer, tmp_path, monkeypatch):
    read, frames = [], Video.frames
    monkeypatch.setattr(Video, "frames", lambda video, indices: read.append(video.path.name) or frames(video, indices))
    net = module()
    fitted(net, data(feature_cache=tmp_path / "cache"), trainer, max_epochs=3)
    assert sorted(read) == sorted(set(read))
    assert len(read) == 18  # of training and validation
    again = module()
    fitted(again, data(feature_cache=tmp_path / "cache"), trainer, max_epochs=3)
    assert len(read) == 18
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))
