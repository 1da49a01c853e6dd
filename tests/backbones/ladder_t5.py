"""A ladder beside a small T5 of transformers, for the tests of ladders."""

import dataclasses
from functools import partial

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from fulgurite.backbones.language_specs import t5_spec
from fulgurite.backbones.side_blocks import side_blocks_of
from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.ladder import LadderSide

POINTS = ["encoder_block", "decoder_block", "read_out"]
BUCKETS, DISTANCE = 8, 20


class ReadOut(nn.Module):
    """The place between a decoder and the head."""

    def forward(self, x):
        return x


def after(slot, module, args, output):
    output.last_hidden_state = slot(output.last_hidden_state)
    return output


def build(layers=3, gated=False, seed=0, **sizes):
    torch.manual_seed(seed)
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 48, "num_heads": 3, "vocab_size": 40} | sizes
    config = T5Config(
        num_layers=layers,
        num_decoder_layers=layers,
        relative_attention_num_buckets=sizes.pop("buckets", BUCKETS),
        relative_attention_max_distance=DISTANCE,
        feed_forward_proj="gated-gelu" if gated else "relu",
        decoder_start_token_id=0,
        initializer_factor=2.0,
        **sizes,
    )
    model = T5ForConditionalGeneration(config)
    if model.device.type != "meta":
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
    model.read_out = ReadOut()
    model.decoder.register_forward_hook(partial(after, model.read_out))
    points = {f"{s}_block": (rf"{s}\.block\.\d+", layers) for s in ("encoder", "decoder")}
    model.spec = dataclasses.replace(t5_spec(config), points=points | {"read_out": ("read_out", 1)})
    return model.requires_grad_(False).eval()


def with_ladder(model, seed=1, **options):
    kind = partial(LadderSide, **{"side_blocks": side_blocks_of, "reduction": 4} | options)
    bank = AdapterBank(model, [Placement(POINTS, kind)], sets=()).eval()
    ladder = bank.adapters_of("live")["placement-0"]
    if model.device.type != "meta":
        with torch.no_grad():
            for stack in ladder.stacks:
                if stack.gates is not None:
                    stack.gates.copy_(torch.linspace(-0.1, 0.15, len(stack.gates)))
    return bank, ladder


def inputs():
    g = torch.Generator().manual_seed(5)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 5:] = mask[2, 4:] = 0
    return {
        "input_ids": torch.randint(2, 40, (3, 7), generator=g),
        "attention_mask": mask,
        "labels": torch.randint(2, 40, (3, 4), generator=g),
    }
