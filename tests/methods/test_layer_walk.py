"""What a walk measures, against a reference that runs the whole model anew for every layer."""

import copy
import logging

import pytest
import torch
from torch import nn

from fulgurite.methods.block_calls import catch_calls
from fulgurite.methods.compression import Compressor, compressed_blocks, matrix, put
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.pruning.sparsegpt import SparseGpt
from fulgurite.methods.structure import ModelSpec, Tower

TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}  # float64, whose sums may be taken in another order


class Recorded(Compressor):
    """Another compressor, whose moments are noted."""

    def __init__(self, inner):
        self.inner, self.moments = inner, {}
        self.sequential = inner.sequential

    @property
    def needs(self):
        return self.inner.needs

    def compress(self, name, weight, moment):
        self.moments[name] = moment.clone()
        return self.inner.compress(name, weight, moment)


def reference(model, blocks, batches, forward, compressor, masks=None, sequential=False):
    """Moments by name, and the model that they lead to: every layer's inputs come from a run of the whole model.

    Layers are taken in the order in which the model calls them.
    """
    model = copy.deepcopy(model)
    moments = {}

    def gram(names):
        sums, counts, order, hooks = {}, {}, [], []
        for name in names:

            def take(_, args, name=name):
                rows = args[0].reshape(-1, args[0].shape[-1])
                if masks is not None:
                    rows = rows[masks(batch, [name])[name].flatten() != 0]
                sums[name] = sums.get(name, 0) + rows.T @ rows
                counts[name] = counts.get(name, 0) + len(rows)
                if name not in order:
                    order.append(name)

            hooks.append(model.get_submodule(name).register_forward_pre_hook(take))
        with torch.no_grad():
            for batch in batches:
                forward(model, batch)
        for hook in hooks:
            hook.remove()
        return {name: sums[name] / counts[name] for name in order}

    def compress(found):
        for name, moment in found.items():
            layer, moments[name] = model.get_submodule(name), moment
            put(layer, compressor.compress(name, matrix(layer), moment).weight)

    for block in blocks:
        prefix = f"{block}."
        names = [name for name, each in model.named_modules() if name.startswith(prefix) and hasattr(each, "weight")]
        names = [name for name in names if isinstance(model.get_submodule(name), nn.Linear)]
        found = gram(names)
        if sequential:
            for name in found:
                compress({name: gram([name])[name]})
        else:
            compress(found)
    return moments, model


def agrees(model, spec, batches, forward, masks=None, sequential=False):
    """A walk gives what the reference gives; returns the compressed model."""
    compressor = SparseGpt(0.5, sequential=sequential)
    blocks = spec.all_block_names(model)
    expected, other = reference(model, blocks, batches, forward, compressor, masks, sequential)
    own, noted = copy.deepcopy(model), Recorded(compressor)
    walk = LayerWalk(own, spec, batches, lambda batch: forward(own, batch), masks)
    for _ in compressed_blocks(walk, noted):
        pass
    assert noted.moments.keys() == expected.keys()
    for name, moment in expected.items():
        torch.testing.assert_close(noted.moments[name], moment, **TOLERANCE)
    state = other.state_dict()
    for name, tensor in own.state_dict().items():
        torch.testing.assert_close(tensor, state[name], **TOLERANCE)
    assert any(not torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    return own


def tokens(count=2):
    return [torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(i)) for i in range(count)]


@pytest.fixture(scope="module")
def opt():
    from transformers import OPTConfig, OPTForCausalLM

    from fulgurite.backbones.language_specs import language_spec

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "ffn_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = OPTConfig(vocab_size=40, word_embed_proj_dim=8, max_position_embeddings=16, init_std=0.2, **sizes)
        model = OPTForCausalLM(config).double().eval()
    return model, language_spec(model)


def run_of(name):
    return lambda model, ids: model(input_ids=ids, use_cache=False, **({"labels": ids} if name == "t5" else {}))


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("name", ["llama", "opt", "t5"])
def test_language_models_see_what_a_run_of_the_whole_model_sees(name, sequential, language_models, opt):
    model, spec = opt if name == "opt" else language_models[name]
    agrees(model, spec, tokens(), run_of(name), sequential=sequential)


def test_cross_attention_reads_the_compressed_encoder(language_models):
    """Changing the encoder alone changes the moments of the decoder's keys."""
    model, spec = language_models["t5"]
    seen = {}
    for towers in (None, ("decoder",)):
        own, noted = copy.deepcopy(model), Recorded(SparseGpt(0.5))
        walk = LayerWalk(own, spec, tokens(), lambda ids, own=own: run_of("t5")(own, ids), towers=towers)
        for _ in compressed_blocks(walk, noted):
            pass
        seen[towers] = noted.moments["decoder.block.0.layer.1.EncDecAttention.k"]
    assert not torch.allclose(*seen.values(), rtol=1e-3)


SPEC = ModelSpec((Tower("chain", r"blocks\.\d+", 3, 6),))


def call(model, batch):
    return model(batch)


@pytest.mark.parametrize("sequential", [False, True])
def test_padding_is_left_out(sequential, chain):
    model, rows, padded = chain()
    agrees(model, SPEC, list(zip(rows, padded)), call, lambda batch, names: dict.fromkeys(names, batch[1]), sequential)


@pytest.mark.parametrize(
    ("how", "again"),
    [
        ("plain", []),
        ("tuple", []),
        ("in place", []),
        ("between", ["blocks.1"]),
        ("written between", ["blocks.2"]),
        ("skip", ["blocks.2"]),
    ],
)
def test_inputs_are_caught_anew_where_blocks_do_not_follow_each_other(how, again, caplog, chain):
    model, rows, _ = chain(how)
    with caplog.at_level(logging.INFO, "fulgurite.methods.layer_walk"):
        agrees(model, SPEC, rows, call)
    assert [record.args[0] for record in caplog.records if "caught anew" in record.msg] == again


def test_a_block_may_be_measured_again_and_gives_what_it_gave(chain):
    """A block that writes into its input must not change what is kept of it."""
    model, rows, _ = chain("in place")
    for block in LayerWalk(model, SPEC, rows, model):
        first, second = list(block.outputs()), list(block.outputs())
        assert all(map(torch.equal, first, second))


def test_gradients_stay_on_for_the_caller(chain):
    model, rows, _ = chain()
    for block in LayerWalk(model, SPEC, rows, model):
        for _ in block.outputs():
            assert torch.is_grad_enabled()
        assert torch.is_grad_enabled()


def test_no_hook_is_left(chain):
    model, rows, _ = chain()
    for _ in compressed_blocks(LayerWalk(model, SPEC, rows, model), SparseGpt(0.5)):
        pass
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


def test_layers_that_share_an_input_are_one_group_in_the_order_of_calls(chain):
    model, rows, _ = chain()
    block = next(iter(LayerWalk(model, SPEC, rows, model)))
    groups = block.input_groups(block.linears())
    assert groups == [["blocks.0.query", "blocks.0.value"], ["blocks.0.out"]]


def test_without_data_blocks_come_in_order_without_inputs(chain):
    model, _, _ = chain()
    blocks = list(LayerWalk(model, SPEC, [], model))
    assert [block.name for block in blocks] == [f"blocks.{i}" for i in range(3)]
    assert not any(block.inputs or block.calls for block in blocks)
    with pytest.raises(ValueError, match=r"blocks\.0: there is no calibration data .* blocks\.0\.out"):
        blocks[0].grams([["blocks.0.out"]])


def test_offloading_changes_nothing(chain):
    model, rows, _ = chain()
    moments = []
    for offload in (True, False):
        noted = Recorded(SparseGpt(0.5))
        own = copy.deepcopy(model)
        for _ in compressed_blocks(LayerWalk(own, SPEC, rows, own, offload=offload), noted):
            pass
        moments.append(noted.moments)
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])


def test_walked_towers_are_those_named(language_models):
    model, spec = language_models["t5"]
    walk = LayerWalk(model, spec, [], model, towers=["decoder"])
    assert [block.tower.name for block in walk] == ["decoder"] * 2
    with pytest.raises(ValueError, match=r"towers=\['text'\]: this model has \['encoder', 'decoder'\]"):
        LayerWalk(model, spec, [], model, towers=["text"])


def test_inference_mode_hides_no_writes(chain):
    model, rows, _ = chain("written between")
    expected = [block.inputs[0] for block in LayerWalk(model, SPEC, rows, model)]
    with torch.inference_mode():
        found = [block.inputs[0] for block in LayerWalk(model, SPEC, rows, model)]
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("sequential", [False, True])
def test_a_text_tower_behind_video_sees_no_padding(sequential):
    from fulgurite.backbones.frames import TimmFrameEncoder
    from fulgurite.backbones.prefix_encoder import PrefixEncoder
    from fulgurite.samples import Sample

    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        encoder = TimmFrameEncoder("test_efficientnet", weights=None, size=64, grid=1)
        model = PrefixEncoder(frame_encoder=encoder, num_frames=2, pretrained=False, text_config=sizes)
    model.set_answers(["red", "blue"])
    model.double()
    collate = model.collator("test")
    batches = []
    for seed, questions in enumerate((("Is it?", "Which way does the red box move?"), ("What is it?", "Why?"))):
        generator = torch.Generator().manual_seed(seed)
        features = {encoder.name: torch.randn(2, 1, encoder.width, generator=generator)}
        batch = dict(collate([Sample(id=q, domain="d", question=q, features=features) for q in questions]))
        batches.append({**batch, "video": batch["video"].double()})
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    agrees(
        model,
        model.spec,
        batches,
        lambda backbone, batch: backbone.pass_blocks(batch),
        lambda batch, names: dict.fromkeys(names, model.token_masks(batch)[r"text\..*"]),
        sequential,
    )


@pytest.mark.parametrize("whole_pass", [False, True])
def test_a_pass_ends_behind_the_last_block_unless_all_ranks_must_go_on(whole_pass, chain):
    model, rows, _ = chain("between")
    ends = []
    model.head.register_forward_hook(lambda *_: ends.append(1))
    modules = {name: model.get_submodule(name) for name in SPEC.all_block_names(model)}
    first, calls = catch_calls(modules, lambda: model(rows[0]), torch.device("cpu"), whole_pass)
    assert (len(calls), len(ends)) == (1, int(whole_pass))  # something lies behind the first block
    torch.testing.assert_close(first, torch.tanh(model.stem(rows[0])))


def test_a_batch_runs_no_further_than_to_the_layers_that_are_measured(chain):
    model, rows, _ = chain()
    block = next(iter(LayerWalk(model, SPEC, rows, model)))
    first, last = block.input_groups(block.linears())
    runs = []
    block.module.out.register_forward_hook(lambda *_: runs.append(1))
    short = block.grams([first]).means()
    assert not runs
    whole = block.grams([first, last]).means()
    assert not runs  # the last one's input is known before it runs
    assert whole.keys() == {*first, *last}
    assert all(torch.equal(short[name], whole[name]) for name in first)


def test_a_layer_that_is_called_twice_is_measured_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(self.inner(x))

    torch.manual_seed(0)
    model = nn.Sequential(Twice(), Twice()).double().eval()
    rows = [torch.randn(2, 3, 4).double() for _ in range(2)]
    block = next(iter(LayerWalk(model, ModelSpec((Tower("text", r"\d+", 2, 4),)), rows, model)))
    found = block.grams(block.input_groups(block.linears())).means()["0.inner"]
    x = torch.cat([row.flatten(0, 1) for row in rows])
    x = torch.cat([x, model[0].inner(x)])
    torch.testing.assert_close(found, x.T @ x / len(x), **TOLERANCE)


def test_layers_that_are_called_more_often_by_longer_batches_are_measured_throughout():
    class Chunks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return torch.cat([self.inner(part) for part in x.split(3, 1)], 1)

    torch.manual_seed(0)
    model = nn.Sequential(Chunks(), Chunks()).double().eval()
    rows = [torch.randn(2, length, 4).double() for length in (3, 7, 3)]
    block = next(iter(LayerWalk(model, ModelSpec((Tower("text", r"\d+", 2, 4),)), rows, model)))
    found = block.grams(block.input_groups(block.linears())).means()["0.inner"]
    x = torch.cat([row.flatten(0, 1) for row in rows])
    torch.testing.assert_close(found, x.T @ x / len(x), **TOLERANCE)


def test_an_input_that_was_written_into_is_another_one():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = x * 2
            y = self.first(h)
            return y + self.second(h.relu_())

    torch.manual_seed(0)
    model = nn.Sequential(Written(), Written()).double().eval()
    rows = [torch.randn(2, 3, 4).double()]
    block = next(iter(LayerWalk(model, ModelSpec((Tower("text", r"\d+", 2, 4),)), rows, model)))
    groups = block.input_groups(block.linears())
    assert groups == [["0.first"], ["0.second"]]
    found = block.grams(groups).means()["0.second"]
    x = (rows[0].flatten(0, 1) * 2).relu()
    torch.testing.assert_close(found, x.T @ x / len(x), **TOLERANCE)
