"""Which tokens of a caption count: those that its feature depends on, and no others."""

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

from fulgurite.backbones.dual_encoders import caption_mask

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
