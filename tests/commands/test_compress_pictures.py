"""``prune`` and ``quantize`` of image models of three libraries, calibrated on a folder of pictures."""

import shutil

import pytest
import torch
from PIL import Image

import fulgurite
from fulgurite.backbones.library_models import open_library_model
from fulgurite.checkpoints import read_manifest, verify
from fulgurite.checkpoints.sources import open_source
from fulgurite.cli import main
from fulgurite.datamodules.picture_files import drawn_pictures
from fulgurite.methods.compression import compressed_blocks, matrices
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.packed_attention import exposed_attention
from fulgurite.methods.pruning.wanda import Wanda
from fulgurite.methods.quantization.gptq import Gptq
from fulgurite.samples.errors import DataError


@pytest.mark.parametrize("name", ["vit", "clip", "siglip", "timm", "open_clip"])
def test_a_tower_for_pictures_is_compressed(name, image_models, pictures, tmp_path, in_process):
    folder, pruned, out = image_models / name, tmp_path / "pruned", tmp_path / "out"
    given = ("--pictures", str(pictures), "--samples", "5", "--device", "cpu")
    assert (
        main(["prune", str(folder), "--pruner", "Wanda", "--pruner.sparsity", "0.5", *given, "--out", str(pruned)]) == 0
    )
    gptq = ("--quantizer", "Gptq", "--quantizer.bits", "3", "--quantizer.group_size", "8", "--format", "own")
    assert main(["quantize", str(pruned), *gptq, *given, "--out", str(out)]) == 0
    opened = open_library_model(open_source(folder))
    images = [Image.open(picture.path) for picture in drawn_pictures(pictures, 5, 0)]
    with exposed_attention(opened.model, opened.spec.inside_blocks), torch.no_grad():
        walk = LayerWalk(opened.model, opened.spec, [opened.picture_inputs(images)], opened.forward, towers=["vision"])
        masks = {}
        for compressor in (Wanda(0.5), Gptq(3, 8)):
            if masks:
                compressor.keep_zeros(masks)
            compressor.begin(matrices(walk))
            for done in compressed_blocks(walk, compressor):
                masks |= {name: result.mask for name, result in done.results.items() if result.mask is not None}
    assert all(verify(path).ok for path in (pruned, out))
    expected = opened.model.state_dict()
    found = fulgurite.load_model(out).state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    layers = read_manifest(out).facts["layers"]
    assert len(layers) == len(masks)
    assert {layer["tower"] for layer in layers} == {"vision"}


def test_too_few_pictures_and_the_wrong_data_are_one_message(image_models, pictures, tmp_path, llamas, capfd):
    for name in ("vit", "clip"):
        shutil.copytree(image_models / name, tmp_path / name)
    (tmp_path / "clip" / "processor_config.json").unlink()
    wanda, shown = ("--pruner", "Wanda", "--pruner.sparsity", "0.5"), ("--pictures", str(pictures))
    wrong = {
        "is measured on pictures: give --pictures": (tmp_path / "vit", "--text", str(llamas / "text.txt")),
        "is measured on text: give --text": (llamas / "llama", *shown),
        "holds 8 pictures, and 9 are wanted": (tmp_path / "vit", *shown, "--samples", "9"),
        "no preprocessor_config.json or processor_config.json": (tmp_path / "clip", *shown, "--samples", "2"),
        "through the tower 'vision' alone": (tmp_path / "clip", *shown, "--towers", "[text]"),
        "has no perplexity": (tmp_path / "vit", *shown, "--evaluate", str(llamas / "text.txt")),
        "needs a loss": (tmp_path / "vit", *shown, "--allocation", "Ecoflap"),
    }
    for message, (model, *argv) in wrong.items():
        assert main(["prune", str(model), *wanda, *argv, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
        assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "vit" / "folder.jpg").mkdir()
    with pytest.raises(DataError, match="holds 0 pictures"):
        drawn_pictures(tmp_path / "vit", 1, 0)
    with pytest.raises(DataError, match="missing: no such folder; --pictures"):
        drawn_pictures(tmp_path / "missing", 1, 0)


def test_pictures_are_drawn_without_replacement(pictures):
    first = [picture.path.name for picture in drawn_pictures(pictures, 8, 0)]
    assert sorted(first) == [f"{number}.png" for number in range(8)]
    assert [picture.path.name for picture in drawn_pictures(pictures, 3, 0)] == first[:3]
    assert [picture.path.name for picture in drawn_pictures(pictures, 8, 1)] != first
