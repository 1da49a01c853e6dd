"""From samples to text, visual tokens and pixels."""

import pytest
import torch

from fulgurite.backbones.frames import TimmFrameEncoder
from fulgurite.samples import DataError, Sample
from fulgurite.samples.collator import check_picklable


def sample(name="one", question="what is this", shape=(9, 12), num_images=1, **fields):
    features = {"clip_rn101": torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))}
    given = {"features": features, "num_images": num_images, "domain": "d", "task": "vqa"}
    return Sample(id=name, question=question, **{**given, **fields})


@pytest.fixture(scope="module", params=["bart", "t5"])
def model(request, make_generative):
    return make_generative(request.param, tokenizer=True, train_dropout="off")


def test_text_and_features_of_one_and_of_two_pictures(model):
    collator = model.collator("fit")
    check_picklable(collator)
    assert collator.needs == ("question", "features.clip_rn101")
    pair = sample("three", "is it", (18, 12), num_images=2)
    batch = collator([sample(), pair])
    assert batch["task"] == ["vqa", "vqa"]
    assert batch["text"].tolist() == [[101, 2054, 2003, 2023, 102], [101, 2003, 2009, 102, 0]]
    assert batch["text_mask"].tolist() == [[True] * 5, [True] * 4 + [False]]
    assert batch["picture"].tolist() == [[0] * 4 + [-1] * 4, [0] * 4 + [1] * 4]
    assert not batch["features"][0, 4:].any()
    for half in range(2):
        alone = collator([sample(features={"clip_rn101": pair.features["clip_rn101"][9 * half : 9 * half + 9]})])
        assert torch.equal(batch["features"][1, 4 * half : 4 * half + 4], alone["features"][0])
    assert model(batch, torch.tensor([[101, 102], [101, 102]])).shape == (2, 2, 30530)


def test_two_equal_pictures_have_equal_halves(model):
    grid = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
    batch = model.collator("fit")([sample(num_images=2, features={"clip_rn101": torch.cat([grid, grid])})])
    assert torch.equal(batch["features"][0, :4], batch["features"][0, 4:])
    tokens, real = model.visual_tokens(batch)
    numbers = model.visual_embedding.img_order_embedding.weight
    torch.testing.assert_close(tokens[0, :4] - numbers[0], tokens[0, 4:] - numbers[1])
    assert real.all()


def test_an_empty_question_is_a_text(model):
    batch = model.collator("fit")([sample(question="")])
    assert batch["text"].tolist() == [[101, 102]]


def test_a_second_text_is_not_passed_over(model):
    with pytest.raises(DataError, match=r"'two' has two texts, and this model reads one: set data[.]form=text"):
        model.collator("fit")([sample(), sample("two", text_pair="and this")])


def test_longer_texts_are_cut_where_told_and_an_error_elsewhere(make_generative):
    long = sample(question="what " * 30)
    model = make_generative("bart", tokenizer=True, max_tokens=6)
    with pytest.raises(DataError, match=r"'one' has 32 tokens; raise backbone.init_args.max_tokens=6"):
        model.collator("fit")([sample("two"), long])
    cut = make_generative("bart", tokenizer=True, max_tokens=6, long_text="cut").collator("fit")([long])
    assert cut["text"].tolist() == [[101, 2054, 2054, 2054, 2054, 102]]


@pytest.mark.parametrize(
    ("shape", "num_images", "said"),
    [
        ((9, 20), 1, r"have shape \(9, 20\), expected \(tokens, 12\)"),
        ((9, 12), 2, "with 2 pictures have shape"),
        ((0, 12), 1, r"have shape \(0, 12\)"),
        ((12,), 1, r"have shape \(12,\)"),
        ((5, 12), 1, "5 tokens are no square grid; set backbone.init_args.grid"),
        ((1, 12), 1, "1 x 1 cannot be pooled to 2 x 2"),
    ],
)
def test_features_that_do_not_fit(model, shape, num_images, said):
    with pytest.raises(DataError, match=said):
        model.collator("fit")([sample(shape=shape, num_images=num_images)])


def test_more_tokens_than_have_an_embedding(make_generative):
    model = make_generative("bart", tokenizer=True, grid=None)
    with pytest.raises(DataError, match="144 visual tokens of a picture, and there are embeddings for 100"):
        model.collator("fit")([sample(shape=(144, 12))])


def test_more_pictures_than_have_an_embedding(model):
    with pytest.raises(DataError, match="has 3 pictures, and this model has embeddings for 2"):
        model.collator("fit")([sample(shape=(12, 12), num_images=3)])


def test_features_of_another_name_need_an_encoder(model):
    with pytest.raises(DataError, match=r"has features \['other'\], not 'clip_rn101'"):
        model.collator("fit")([sample(features={"other": torch.zeros(9, 12)})])


def test_raw_pictures_and_stored_tokens_of_an_encoder_are_one_thing(make_generative):
    encoder = TimmFrameEncoder("test_efficientnet", weights=None, size=64, grid=2)
    model = make_generative("bart", tokenizer=True, encoder=encoder, grid=1, train_dropout="off")
    collator = model.collator("test")
    assert collator.needs == ("question", f"features.{encoder.name}|images|image|video")
    pictures = torch.randint(0, 256, (3, 3, 80, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one = sample("one", image=pictures[0], features={})
    two = sample("two", images=(pictures[1], pictures[2]), num_images=2, features={})
    raw = collator([one, two])
    assert raw["pixels"].shape == (3, 3, 64, 64)
    assert raw["picture"].tolist() == [[0, -1], [0, 1]]
    grids = encoder(encoder.transform(pictures))
    stored = collator(
        [
            sample("one", features={encoder.name: grids[:1]}),
            sample("two", features={encoder.name: grids[1:]}, num_images=2),
        ]
    )
    assert torch.equal(stored["features"][1], grids[1:].amax(1))
    targets = torch.tensor([[101, 102], [101, 102]])
    assert torch.equal(model(stored, targets), model(raw, targets))
    assert model.feature_extractor().encoder is encoder
    with pytest.raises(DataError, match="has 1 pictures where it says 2"):
        collator([sample(image=pictures[0], num_images=2, features={})])
    with pytest.raises(ValueError, match="grid=3 pools"):
        make_generative("bart", encoder=encoder, grid=3)


def test_text_alone(make_generative):
    model = make_generative("t5", tokenizer=True, features=None)
    collator = model.collator("fit")
    assert collator.needs == ("question",)
    assert "picture" not in collator([sample(features={})])
    assert "visual_embedding" not in model.spec.points


@pytest.mark.parametrize(
    ("config", "said"),
    [({"vocab_size": 100}, "30522 tokens, the language model 108"), ({"pad_token_id": 5}, "pads with token 0")],
)
def test_a_tokenizer_of_another_model(make_generative, config, said):
    with pytest.raises(ValueError, match=said):
        make_generative("bart", config=config, tokenizer=True).collator("fit")
