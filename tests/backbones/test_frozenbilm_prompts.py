import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fulgurite.backbones.prompts import FrozenBiLMCollator, mask_prompt, video_tokens
from fulgurite.samples import DataError, Sample, check_picklable

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
WORDS = [
    "question",
    "what",
    "is",
    "this",
    "answer",
    "subtitles",
    "hello",
    "there",
    "someone",
    "pets",
    ":",
    ".",
    "?",
]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = dict(zip(["pad_token", "cls_token", "sep_token", "unk_token", "mask_token"], SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def sample(name="a", question="what is this", frames=3, **fields):
    rows = torch.arange(1.0, frames + 1).half()[:, None].expand(frames, 2)
    return Sample(name, "d", question=question, features={"clip": rows}, **fields)


def collator(tokenizer, **options):
    return FrozenBiLMCollator(tokenizer, features="clip", feature_dim=2, **options)


@pytest.mark.parametrize(
    ("question", "options", "expected"),
    [
        ("what is This", {}, "Question: What is this? Answer: [MASK]."),
        ("what is this?", {}, "Question: What is this? Answer: [MASK]."),
        (" who ", {}, "Question: who? Answer: [MASK]."),
        ("what", {"suffix": '"."'}, 'Question: What? Answer: [MASK]"."'),
        ("what", {"suffix": ""}, "Question: What? Answer: [MASK]"),
        ("what", {"speech": "Hello There"}, "Question: What? Answer: [MASK]. Subtitles: Hello There"),
        ("what", {"speech": ""}, "Question: What? Answer: [MASK]."),
        ("SOMEONE pets the _____ now.", {}, "Someone pets the [MASK] now."),
        ("SOMEONE pets the _____", {"speech": "hi"}, "Someone pets the [MASK] Subtitles: hi"),
        ("_____ Waves", {}, "[MASK] waves"),
    ],
)
def test_prompts_of_the_published_code(question, options, expected):
    assert mask_prompt(question, "[MASK]", **options) == expected


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (0, [0.0]),
        (1, [1]),
        (10, list(range(1, 11))),
        (11, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (25, [1, 3, 6, 8, 11, 13, 16, 18, 21, 23]),
        (600, [1, 61, 121, 181, 241, 301, 361, 421, 481, 541]),
    ],
)
def test_frames_of_short_and_long_videos(frames, expected):
    video, mask = video_tokens(torch.arange(1.0, frames + 1)[:, None].expand(frames, 2), 10)
    assert video.shape == (10, 2)
    assert video.dtype == torch.float32
    assert video[:, 0].tolist() == expected + [0.0] * (10 - len(expected))
    assert mask.tolist() == [True] * len(expected) + [False] * (10 - len(expected))


def test_batch_is_padded_to_its_longest_text_and_finds_the_mask(tokenizer):
    check_picklable(collator(tokenizer))
    samples = [sample("a"), sample("b", "is", frames=0, speech="hello there")]
    batch = collator(tokenizer, max_frames=4)(samples)
    texts = [
        "Question: What is this? Answer: [MASK].",
        "Question: Is? Answer: [MASK]. Subtitles: hello there",
    ]
    for row, text in enumerate(texts):
        alone = tokenizer(text)["input_ids"]
        assert batch["input_ids"][row, : len(alone)].tolist() == alone
        assert batch["attention_mask"][row].sum() == len(alone)
        assert batch["mask_position"][row] == alone.index(tokenizer.mask_token_id)
    assert batch["input_ids"].shape[1] == max(len(tokenizer(text)["input_ids"]) for text in texts)
    assert batch["video"].dtype == torch.float32
    assert batch["video_mask"].tolist() == [[True, True, True, False], [True, False, False, False]]
    assert batch["id"] == ["a", "b"]


def test_speech_only_on_request(tokenizer):
    samples = [sample(speech="hello there")]
    silent = collator(tokenizer, use_speech=False)(samples)
    assert torch.equal(silent["input_ids"], collator(tokenizer)([sample()])["input_ids"])


def test_end_token_is_hidden_only_without_suffix_and_speech(tokenizer):
    for options, hidden in [
        ({"suffix": "", "use_speech": False}, 1),
        ({"suffix": ""}, 0),
        ({"use_speech": False}, 0),
    ]:
        batch = collator(tokenizer, **options)([sample()])
        length = len(tokenizer(mask_prompt("what is this", "[MASK]", options.get("suffix", ".")))["input_ids"])
        assert batch["attention_mask"].sum() == length - hidden
        assert batch["attention_mask"][0, -1] == 1 - hidden


def test_text_is_cut_on_the_right(tokenizer):
    long = sample(speech="hello there " * 50)
    batch = collator(tokenizer, max_tokens=16)([long])
    assert batch["input_ids"].shape == (1, 16)
    assert batch["input_ids"][0, -1] == tokenizer.sep_token_id


def test_stored_features_of_an_encoder_have_one_token_per_frame(tokenizer):
    rows = sample().features["clip"]
    stored = Sample("a", "d", question="what is this", features={"clip": rows[:, None]})
    assert torch.equal(collator(tokenizer)([stored])["video"], collator(tokenizer)([sample()])["video"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (sample("x", "what " * 40), "'x' holds 0 '\[MASK\]'"),
        (sample("x", speech="hello [MASK]"), "'x' holds 2 '\[MASK\]'"),
        (Sample("x", "d", question="what", features={"vit": torch.zeros(1, 2)}), r"\['vit'\], not 'clip'"),
        (
            Sample("x", "d", question="what", features={"clip": torch.zeros(3, 5)}),
            r"\(3, 5\), expected \(frames, 2\)",
        ),
    ],
)
def test_bad_samples_are_named(tokenizer, wrong, message):
    with pytest.raises(DataError, match=message):
        collator(tokenizer, max_tokens=30)([sample("good"), wrong])


def test_question_alone(tokenizer):
    batch = FrozenBiLMCollator(tokenizer, features=None)([Sample("a", "d", question="what")])
    assert "video" not in batch
    assert FrozenBiLMCollator(tokenizer, features=None).needs == ("question",)
