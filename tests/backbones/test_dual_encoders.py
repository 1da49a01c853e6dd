"""Captions by open_clip's own tokenizer, and which of their tokens count: those that the feature depends on."""

import json

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

from fulgurite.backbones.dual_encoders import caption_inputs, caption_mask
from fulgurite.checkpoints import MissingError

VISION = CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=8, image_size=16)
TEXT = {"context_length": 6, "vocab_size": 32, "width": 16, "heads": 2, "layers": 2}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (CLIP, {}),
        (CustomTextCLIP, {}),
        (CLIP, {"pool_type": "eos", "eos_id": 9}),
        (CustomTextCLIP, {"pool_type": "eos", "eos_id": 9}),
        (CustomTextCLIP, {"pool_type": "last"}),
        (CustomTextCLIP, {"no_causal_mask": True, "pool_type": "last"}),
        (CustomTextCLIP, {"no_causal_mask": True}),
    ],
)
def test_tokens_that_do_not_count_do_not_change_the_feature(kind, options):
    torch.manual_seed(0)
    model = kind(8, VISION, CLIPTextCfg(**TEXT, **options)).eval()
    last = options.get("eos_id", 31)
    ids = torch.tensor([[1, 5, last, 0, 0, 0], [1, 4, 5, 6, last, 0]])
    mask = caption_mask("open_clip", model, {"text": ids})
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    with torch.no_grad():
        before = model.encode_text(ids)
        for row, column in torch.cartesian_prod(torch.arange(2), torch.arange(6)).tolist():
            if ids[row, column] == last:
                continue
            other = ids.clone()
            other[row, column] = 7 if ids[row, column] != 7 else 8
            changed = not torch.equal(model.encode_text(other)[row], before[row])
            assert changed == bool(mask[row, column]), (row, column)


def test_captions_are_padded_and_cut_as_open_clip_does_it(tmp_path):
    model = CLIP(8, VISION, CLIPTextCfg(**TEXT | {"vocab_size": 49408})).eval()
    config = {"model_cfg": {"text_cfg": {"context_length": 6}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    captions = {"line 1": "a dog", "line 2": "a dog and a cat and a bird"}
    found = caption_inputs("open_clip", model, tmp_path, captions)["text"]
    assert found.shape == (2, 6)
    assert found[0].tolist()[3:] == [49407, 0, 0]
    assert found[1, -1] == 49407
    assert torch.equal(found[0, :3], found[1, :3])
    with pytest.raises(ValueError, match="gives token 49407, and the model has 32"):
        caption_inputs("open_clip", CLIP(8, VISION, CLIPTextCfg(**TEXT)), tmp_path, captions)
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "owner/name"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(MissingError, match="has no tokenizer"):
        caption_inputs("open_clip", model, tmp_path, captions)
