"""A library's model has the values of the files, to the bit."""

import torch
import transformers

from fulgurite.backbones.foreign_models import model_of


def test_tensors_of_several_types_lose_nothing(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=9, max_position_embeddings=4, **sizes))
    model.config.architectures = ["BertModel"]
    model.config.save_pretrained(tmp_path)
    tensors = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    name = "encoder.layer.0.attention.output.LayerNorm.weight"
    tensors[name] = torch.randn(8)
    found = model_of("hf", tensors, tmp_path, None).state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key].double(), tensor.double()) for key, tensor in tensors.items())
