"""Blocks that compute their insides again: the same numbers from every backbone, and nothing inside is kept."""

import copy

import pytest
import torch

from fulgurite.backbones.frozenbilm import FrozenBiLM
from fulgurite.backbones.llava import Llava
from fulgurite.backbones.prefix_encoder import PrefixEncoder
from fulgurite.backbones.text_classifier import TextClassifier
from fulgurite.methods.recomputation import recomputes

BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "vocab_size": 40, "eos_token_id": 2}
DEBERTA = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DEBERTA |= {"attention_head_size": 8, "intermediate_size": 32, "position_buckets": 8, "max_position_embeddings": 32}


class Numbers:
    """An answer is a row of token numbers."""

    def __call__(self, texts, **options):
        return {"input_ids": [[int(n) for n in text.split()] for text in texts]}


def tokens():
    """(B, L) long, and the mask of the real ones."""
    mask = torch.arange(6) < torch.tensor([6, 3])[:, None]
    return torch.randint(4, 40, mask.shape, generator=torch.Generator().manual_seed(0)), mask


def written(backbone):
    text, mask = tokens()
    features = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(1))
    batch = {"text": text, "text_mask": mask, "features": features, "picture": torch.zeros(2, 4, dtype=torch.long)}
    return backbone(batch, text[:, :3])


def classified(backbone):
    text, mask = tokens()
    return backbone({"text": text, "text_mask": mask})


def answered(backbone):
    text, mask = tokens()
    batch = {"input_ids": text, "attention_mask": mask.long(), "mask_position": torch.tensor([1, 2])}
    return backbone(batch).logits


def embedded(backbone):
    text = backbone.caption_batch(["a dog runs", "two cats sit on a mat"])
    side = backbone.transform.size
    pixels = torch.randn(2, 2, 3, side, side, generator=torch.Generator().manual_seed(1))
    videos = backbone.video_tokens({"pixels": pixels, "frame_mask": torch.ones(2, 2, dtype=torch.bool)})
    return torch.cat([backbone.text_tokens(text).sentence, videos.tokens.mean((1, 2))])


def prefix_encoder(**options):
    backbone = PrefixEncoder(pretrained=False, text_config=BERT, routing_layer=-1, **options)
    backbone.set_answers(["red", "blue"])
    return backbone


def frozenbilm(**options):
    limits = {"max_frames": 4, "max_tokens": 12, "routing_layer": -1}
    backbone = FrozenBiLM(pretrained=False, config=DEBERTA, feature_dim=6, **limits, **options)
    backbone.__dict__["tokenizer"] = Numbers()
    backbone.set_answers(["3", "4 5"])
    return backbone


@pytest.fixture
def builders(make, make_generative):
    """By name, what makes a tiny backbone, and its output."""
    return {
        "VLBart": (lambda **options: make_generative("bart", **options), written),
        "VLT5": (lambda **options: make_generative("t5", **options), written),
        "Llava": (lambda **o: Llava(pretrained=False, config=LLAMA, features="grid", feature_dim=12, **o), written),
        "TextClassifier": (lambda **options: TextClassifier(pretrained=False, config=BERT, **options), classified),
        "PrefixEncoder": (prefix_encoder, answered),
        "FrozenBiLM": (frozenbilm, answered),
        "OpenClipVideoText": (lambda **options: make("clip", patch_shift=[1], **options), embedded),
        "of timm": (lambda **options: make("timm_vit", **options), embedded),
    }


NAMES = ("VLBart", "VLT5", "Llava", "TextClassifier", "PrefixEncoder", "FrozenBiLM", "OpenClipVideoText", "of timm")


@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_that_trains_with_dropout_has_the_same_loss_and_gradients(name, builders):
    build, output = builders[name]
    found = []
    for recompute in (False, True, "copied"):
        torch.manual_seed(0)
        backbone = build(train_dropout="official", recompute=bool(recompute))
        backbone.unfreeze()
        backbone = (copy.deepcopy(backbone) if recompute == "copied" else backbone).train()
        blocks = [backbone.get_submodule(block) for block in backbone.spec.all_block_names(backbone)]
        assert all(recomputes(block) == bool(recompute) for block in blocks)
        calls = []
        for block in blocks:
            leaf = next(module for module in block.modules() if not list(module.children()))
            leaf.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        loss = output(backbone).square().mean()
        before = len(calls)
        loss.backward()
        assert (len(calls) > before) == bool(recompute)
        gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
        found.append((loss, gradients, backbone.state_dict()))
    loss, gradients, state = found[0]
    for again, others, named in found[1:]:
        assert torch.equal(again, loss)
        assert named.keys() == state.keys()
        assert others.keys() == gradients.keys()
        for tensor, gradient in gradients.items():
            assert torch.equal(others[tensor], gradient), tensor


@torch.no_grad()
def test_without_gradients_nothing_runs_twice_and_writing_is_the_same(make_generative):
    plain, own = (make_generative("t5", recompute=recompute).eval() for recompute in (False, True))
    text, mask = tokens()
    batch = {"text": text, "text_mask": mask}
    assert torch.equal(plain.generate_ids(batch, 2, 5), own.generate_ids(batch, 2, 5))
