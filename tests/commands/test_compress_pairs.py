"""``prune`` and ``quantize`` of models with a tower for pictures and one for text, calibrated on pairs of both."""

import json
import shutil

import pytest
import torch
from PIL import Image

import fulgurite
from fulgurite.backbones.library_models import open_library_model
from fulgurite.checkpoints import read_manifest, verify
from fulgurite.checkpoints.sources import open_source
from fulgurite.cli import main

HALF = ("--pruner", "Wanda", "--pruner.sparsity", "0.5")
ALLOCATED = ("--pruner", "Magnitude", "--pruner.sparsity", "0.5", "--allocation", "Ecoflap")
DUAL = ["clip", "siglip", "open_clip"]
TEXT_LAYER = {
    "clip": "text_model.encoder.layers.0.mlp.fc2",
    "siglip": "text_model.encoder.layers.0.mlp.fc2",
    "open_clip": "transformer.resblocks.0.mlp.c_proj",
}


def given(pictures, *more):
    return ("--pairs", str(pictures / "pairs.jsonl"), "--samples", "8", "--device", "cpu", *more)


def rows(pictures):
    return [json.loads(line) for line in (pictures / "pairs.jsonl").read_text().splitlines()]


def live(name, folder):
    """The model by its library alone; all captions, the tokens of them that count, and what its tower gives."""
    if name == "open_clip":
        import open_clip

        model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")

        def counted(ids):
            return ids > 0

        return model, tokenizer, counted, model.encode_text
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def tokens(captions):
        return tokenizer(captions, padding="max_length", max_length=14, return_tensors="pt")["input_ids"]

    def features(ids):
        return model.get_text_features(ids, **({"attention_mask": (ids > 0).long()} if name == "clip" else {}))

    return model, tokens, (lambda ids: ids > 0) if name == "clip" else torch.ones_like, features


@pytest.mark.parametrize("name", DUAL)
def test_both_towers_are_pruned_by_what_goes_through_them(name, image_models, pictures, tmp_path, in_process):
    folder, out = image_models / name, tmp_path / "out"
    assert main(["prune", str(folder), *HALF, *given(pictures, "--batch_size", "3"), "--out", str(out)]) == 0
    assert verify(out).ok
    manifest = read_manifest(out)
    layers = manifest.facts["layers"]
    assert [layer["tower"] for layer in layers] == sorted((layer["tower"] for layer in layers), reverse=True)
    assert {layer["tower"]: layer["sparsity"] for layer in layers} == {"vision": 0.5, "text": 0.5}
    about = manifest.settings["calibration"]
    assert (about["of"], about["samples"], about["batch_size"]) == ("pairs", 8, 3)

    model, tokens, counted, features = live(name, folder)
    ids, seen = tokens([row["text"] for row in rows(pictures)]), []
    layer = model.get_submodule(TEXT_LAYER[name])
    layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with torch.no_grad():
        features(ids)
    norm = seen[0][counted(ids).bool()].square().sum(0).sqrt()
    order = (layer.weight.abs() * norm).argsort(dim=1)
    expected = layer.weight.detach().clone().scatter(1, order[:, : layer.weight.shape[1] // 2], 0)
    found = live(name, out)[0].get_submodule(TEXT_LAYER[name]).weight
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", DUAL)
def test_ecoflap_shares_a_target_out_over_both_towers(name, image_models, pictures, tmp_path, in_process):
    folder, one_batch = image_models / name, given(pictures, "--batch_size", "8")
    first = ("--allocation.order", "first", "--allocation.granularity", "layer", "--allocation.target", "0.5")
    assert main(["prune", str(folder), *ALLOCATED, *first, *one_batch, "--out", str(tmp_path / "all")]) == 0
    manifest = read_manifest(tmp_path / "all")
    state = open_library_model(open_source(tmp_path / "all")).model.state_dict()
    towers, size = {"vision": 0, "text": 0}, 0
    for layer in manifest.facts["layers"]:
        weight = state[layer["name"] + ("_weight" if layer["name"].endswith("in_proj") else ".weight")]
        towers[layer["tower"]] += int((weight == 0).sum())
        size += weight.numel()
    assert sum(towers.values()) == size // 2
    assert towers["vision"] != towers["text"]
    importance = manifest.facts["importance"]
    layer, loss = loss_by_the_library(name, folder, pictures)
    loss.backward()
    assert importance[TEXT_LAYER[name]] == pytest.approx(layer.weight.grad.abs().sum().item(), rel=1e-4)


def loss_by_the_library(name, folder, pictures):
    """A layer of the tower for text, and the library's own loss of all pairs."""
    model, tokens, _, _ = live(name, folder)
    ids = tokens([row["text"] for row in rows(pictures)])
    images = [Image.open(pictures / row["image"]) for row in rows(pictures)]
    if name == "open_clip":
        from open_clip.loss import ClipLoss
        from open_clip.transform import PreprocessCfg, image_transform_v2

        prepare = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
        loss = ClipLoss()(*model(torch.stack([prepare(image) for image in images]), ids))
    else:
        from transformers import AutoImageProcessor

        pixels = AutoImageProcessor.from_pretrained(folder)(images=images, return_tensors="pt")["pixel_values"]
        mask = {"attention_mask": (ids > 0).long()} if name == "clip" else {}
        loss = model(input_ids=ids, pixel_values=pixels, return_loss=True, **mask).loss
    return model.get_submodule(TEXT_LAYER[name]), loss


def test_forward_passes_give_each_tower_its_own_target_where_asked(image_models, pictures, tmp_path, in_process):
    each = ("--allocation.per_tower", "true", "--allocation.granularity", "layer", "--allocation.target", "0.5")
    argv = ("prune", str(image_models / "clip"), *ALLOCATED, *each, *given(pictures, "--batch_size", "4"))
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    layers = read_manifest(tmp_path / "out").facts["layers"]
    state = open_library_model(open_source(tmp_path / "out")).model.state_dict()
    for tower in ("vision", "text"):
        own = [state[f"{layer['name']}.weight"] for layer in layers if layer["tower"] == tower]
        assert sum(int((weight == 0).sum()) for weight in own) * 2 == sum(weight.numel() for weight in own)
    assert len({layer["sparsity"] for layer in layers}) > 2


def test_one_tower_is_quantized_where_it_is_chosen(image_models, pictures, tmp_path, in_process):
    gptq = ("--quantizer", "Gptq", "--quantizer.bits", "3", "--quantizer.group_size", "8", "--format", "own")
    folder, out = image_models / "open_clip", tmp_path / "out"
    assert main(["quantize", str(folder), *gptq, *given(pictures), "--towers", "[text]", "--out", str(out)]) == 0
    before, after = open_library_model(open_source(folder)).model.state_dict(), fulgurite.load_model(out).state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert len(changed) == 2 * 4
    assert all(name.startswith("transformer.resblocks.") for name in changed)


def test_a_dry_run_lists_the_towers(image_models, pictures, tmp_path, capfd):
    argv = ["prune", str(image_models / "siglip"), *HALF, *given(pictures), "--out", str(tmp_path / "out"), "--dry-run"]
    for towers, expected in (((), "vision, text"), (("--towers", "[text]"), "text")):
        assert main([*argv, *towers]) == 0
        lines = [" ".join(line.replace("│", " ").split()) for line in capfd.readouterr().out.splitlines()]
        assert f"towers {expected}" in lines
        assert "calibration 8 pairs" in lines
    assert not list(tmp_path.iterdir())


def test_pairs_that_are_of_no_use_are_one_message(image_models, pictures, llamas, tmp_path, capfd):
    clip, circuit = str(image_models / "clip"), ("--task_circuit", "TaskCircuit", "--format", "own")
    shutil.copytree(image_models / "clip", tmp_path / "untold")
    (tmp_path / "untold" / "tokenizer.json").unlink()
    long = tmp_path / "long.jsonl"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    long.write_text('{"image": "a.png", "text": "a bad head"}\n{"image": "a.png", "text": "a bad head had"}\n')
    loss, pairs = (*ALLOCATED, "--allocation.target", "0.5"), given(pictures)
    wrong = {
        "is measured on pictures: give --pictures": ("prune", str(image_models / "vit"), *HALF, *pairs),
        "is measured on text: give --text": ("prune", str(llamas / "llama"), *HALF, *pairs),
        "give --pictures or --pairs": ("prune", clip, *HALF, "--text", str(llamas / "text.txt")),
        "--pictures and --pairs: a model is calibrated with one": ("prune", clip, *HALF, *pairs, "--pictures", "x"),
        "needs no data: leave out --pairs": ("prune", clip, *ALLOCATED[:4], *pairs),
        "give --pairs, which have one": ("prune", clip, *loss, "--pictures", str(pictures)),
        "one pair would be alone": ("prune", clip, *loss, *pairs, "--batch_size", "7"),
        "single examples, and a pair alone has none": ("quantize", clip, "--quantizer", "Gptq", *circuit, *pairs),
        "--length 12": ("prune", clip, *HALF, *pairs, "--length", "12"),
        "--rolled_copies 2": ("quantize", clip, "--quantizer", "Gptq", *circuit[2:], *pairs, "--rolled_copies", "2"),
        "--batch_size 0": ("prune", clip, *HALF, *pairs, "--batch_size", "0"),
        "holds 8 pairs, and 9 are wanted": ("prune", clip, *HALF, *pairs, "--samples", "9"),
        "has no tokenizer": ("prune", str(tmp_path / "untold"), *HALF, *pairs),
        "this model has ['vision', 'text']": ("prune", clip, *HALF, *pairs, "--towers", "[sound]"),
        "long.jsonl, line 2: the caption has 16 tokens, and the model reads 14": (
            "prune", clip, *HALF, "--pairs", str(long), "--samples", "2",
        ),
    }  # fmt: skip
    for message, argv in wrong.items():
        assert main([*argv, "--out", str(tmp_path / "out")]) == 2, message
        assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
