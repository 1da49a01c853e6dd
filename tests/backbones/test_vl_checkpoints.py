"""Published VL-T5 and VL-BART files: names, tied tensors, and what does not fit."""

import pytest
import torch

from fulgurite.backbones.vl_checkpoints import read_vl_checkpoint
from fulgurite.checkpoints.errors import MismatchError

HOMES = {"bart": "model.encoder.visual_embedding.", "t5": "encoder.visual_embedding."}
ORDER = "obj_order_embedding.weight"


@pytest.fixture(params=HOMES)
def kind(request):
    return request.param


def official(model, kind, ddp=False):
    """The tensors of a model under the names of the published code, each tied one under each name."""
    out = {}
    for name, tensor in model.state_dict().items():
        inner = name.removeprefix("language.").replace("visual_embedding.", HOMES[kind], 1)
        out[("module." if ddp else "") + inner] = tensor.clone()
    table = model.token_table.detach().clone()
    out[("module." if ddp else "") + HOMES[kind] + ORDER] = table
    if kind == "t5":
        out["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(8, 2)
    return out


@pytest.fixture
def written(kind, make_generative, tmp_path):
    """A file, and the model that it was made from."""
    model = make_generative(kind, init_seed=7)
    path = tmp_path / "Epoch30.pth"
    torch.save(official(model, kind), path)
    return path, model


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_file_fills_all_of_a_model(written, kind, make_generative, tmp_path):
    path, model = written
    assert same(make_generative(kind, checkpoint=path), model)
    assert not same(make_generative(kind), model)
    assert make_generative(kind, checkpoint=path).source == str(path)
    state = official(model, kind, ddp=True)
    older = {
        name.replace("encoder.", "vis_encoder.", 1) if "decoder" not in name else name: t for name, t in state.items()
    }
    for number, tensors in enumerate((state, older)):
        torch.save(tensors, tmp_path / f"{number}.pth")
        assert same(make_generative(kind, checkpoint=tmp_path / f"{number}.pth"), model)


def test_a_tied_tensor_is_needed_once(written, kind, make_generative):
    path, model = written
    tied = ("lm_head.", "encoder.embed_tokens.", "decoder.embed_tokens.", ORDER)
    state = {name: t for name, t in official(model, kind).items() if not any(part in name for part in tied)}
    torch.save(state, path)
    assert same(make_generative(kind, checkpoint=path), model)


def test_a_table_of_its_own_starts_with_the_rows_of_the_token_table(written, kind, make_generative):
    path, model = written
    own = make_generative(kind, checkpoint=path, train_order=True)
    assert torch.equal(own.visual_embedding.obj_order_embedding.weight, model.token_table.flip(0))


def test_all_that_does_not_fit_is_listed_and_nothing_is_read(written, kind, make_generative):
    path, model = written
    state = official(model, kind)
    feature = f"{HOMES[kind]}feat_embedding.0.weight"
    state[feature] = torch.zeros(16, 20)
    del state[f"{HOMES[kind]}img_order_embedding.weight"]
    state["adapters.vqa.down.weight"] = torch.zeros(2)
    state["lm_head.weight"] = torch.zeros_like(state["lm_head.weight"])
    state[HOMES[kind] + ORDER] = torch.zeros(48, 16)
    torch.save(state, path)
    with pytest.raises(MismatchError) as error:
        make_generative(kind, checkpoint=path)
    text = str(error.value)
    assert text.startswith(f"5 tensors of {path} do not fit")
    assert "visual_embedding.feat_embedding.0.weight: file (16, 20), model (16, 12)" in text
    assert "visual_embedding.img_order_embedding.weight: missing" in text
    assert "language.adapters.vqa.down.weight: in the file, not in the model" in text
    assert "language.lm_head.weight: other values than" in text
    assert "visual_embedding.obj_order_embedding.weight: other values than the token table" in text


def test_another_vocabulary_is_refused(written, kind, make_generative):
    path, _ = written
    with pytest.raises(MismatchError, match=r"file \(48, 16\), model \(40, 16\)"):
        make_generative(kind, checkpoint=path, extra_tokens=0)


def test_what_is_no_state_dict_is_refused(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "file.pth")
    with pytest.raises(MismatchError, match="expected one mapping of names to tensors"):
        read_vl_checkpoint(tmp_path / "file.pth", "")
