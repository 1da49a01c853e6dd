"""A library's model out of its files: text in it, its own tensors, and what is refused."""

import math

import pytest
import torch

from fulgurite.backbones.library_models import open_library_model, other_linears
from fulgurite.checkpoints import MissingError
from fulgurite.checkpoints.sources import open_source
from fulgurite.metrics.perplexity import perplexity


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    folder = tmp_path_factory.mktemp("t5")
    T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(folder)
    return folder


def test_a_sequence_to_sequence_model_answers_the_second_half(t5):
    opened = open_library_model(open_source(t5))
    windows = torch.randint(1, 16, (3, 10), generator=torch.Generator().manual_seed(0))
    assert opened.is_language_model
    assert [tower.name for tower in opened.spec.towers] == ["encoder", "decoder"]
    with torch.no_grad():
        expected = opened.model(input_ids=windows[:, :5], labels=windows[:, 5:].contiguous()).loss.item()
    assert perplexity(opened.scored, map(opened.text_inputs, windows.split(2))) == pytest.approx(
        math.exp(expected), rel=1e-5
    )
    with torch.no_grad():
        assert opened.loss(opened.text_inputs(windows)).item() == pytest.approx(expected, rel=1e-5)


def test_tied_tensors_are_given_once(t5):
    from safetensors.torch import load_file

    opened = open_library_model(open_source(t5))
    assert opened.state().keys() == load_file(t5 / "model.safetensors").keys()
    assert len(opened.model.state_dict()) > len(opened.state())


def test_linear_layers_that_are_left_out_are_named(t5):
    model = open_library_model(open_source(t5)).model
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert other_linears(model, names[:-2]) == names[-2:]
    assert "lm_head" in names[-2:]


def test_files_that_nothing_describes_are_refused(t5, tmp_path):
    file = t5 / "model.safetensors"
    with pytest.raises(MissingError, match="--like"):
        open_library_model(open_source(file))
    assert type(open_library_model(open_source(file), like=t5).model).__name__ == "T5ForConditionalGeneration"
    with pytest.raises(MissingError, match="no tokenizer"):
        open_library_model(open_source(t5)).tokenize("a")


def test_windows_are_as_long_as_the_positions_of_roberta_reach(tmp_path):
    from transformers import RobertaConfig, RobertaModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    RobertaModel(RobertaConfig(vocab_size=16, max_position_embeddings=12, **sizes)).save_pretrained(tmp_path)
    opened = open_library_model(open_source(tmp_path))
    windows = torch.full((1, opened.longest), 5)
    opened.forward(opened.text_inputs(windows))
    with pytest.raises((IndexError, RuntimeError)):
        opened.forward(opened.text_inputs(torch.full((1, opened.longest + 1), 5)))
