"""``prune`` and ``quantize`` of image models of three libraries, calibrated on a folder of pictures."""

import json

import pytest
import torch
from PIL import Image

import fulgurite
from fulgurite.backbones.foreign_models import write_model
from fulgurite.backbones.library_models import open_library_model
from fulgurite.checkpoints import read_manifest, verify
from fulgurite.checkpoints.sources import open_source
from fulgurite.checkpoints.tensorfile import write_tensors
from fulgurite.cli import main
from fulgurite.datamodules.picture_files import drawn_pictures
from fulgurite.methods.compression import compressed_blocks, matrices
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.packed_attention import exposed_attention
from fulgurite.methods.pruning.wanda import Wanda
from fulgurite.methods.quantization.gptq import Gptq
from fulgurite.samples.errors import DataError

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PICTURE = {"image_size": 16, "patch_size": 8}
TEXT = {"vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}


def vit(folder):
    from transformers import ViTConfig, ViTForImageClassification

    ViTForImageClassification(ViTConfig(**SIZES, **PICTURE)).save_pretrained(folder)
    prepare(folder, "ViTImageProcessor")


def clip(folder):
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(text_config=SIZES | TEXT, vision_config=SIZES | PICTURE, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    prepare(folder, "CLIPImageProcessor")


def siglip(folder):
    """It pools by an attention whose keys are not its queries."""
    from transformers import SiglipConfig, SiglipModel

    SiglipModel(SiglipConfig(text_config=SIZES | TEXT, vision_config=SIZES | PICTURE)).save_pretrained(folder)
    prepare(folder, "SiglipImageProcessor")


def prepare(folder, name):
    import transformers

    size = {"height": 16, "width": 16}
    getattr(transformers, name)(size=size, do_center_crop=False).save_pretrained(folder)


def timm_vit(folder):
    import timm

    folder.mkdir()
    write_model("timm", timm.create_model("test_vit", pretrained=False).eval(), folder, architecture="test_vit")


def open_clip_vit(folder):
    import open_clip

    folder.mkdir()
    vision = {"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
    text = {"layers": 2, "width": 16, "heads": 2, "context_length": 8, "vocab_size": 49408}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    write_tensors(folder / "open_clip_model.safetensors", model.state_dict())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight pictures in two folders."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for number in range(8):
        (root / f"{number % 2}").mkdir(exist_ok=True)
        pixels = torch.randint(256, (20, 24, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(root / f"{number % 2}" / f"{number}.png")
    return root


@pytest.mark.parametrize("make", [vit, clip, siglip, timm_vit, open_clip_vit])
def test_a_tower_for_pictures_is_compressed(make, pictures, tmp_path, in_process):
    folder, pruned, out = tmp_path / "model", tmp_path / "pruned", tmp_path / "out"
    torch.manual_seed(0)
    make(folder)
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


def test_too_few_pictures_and_the_wrong_data_are_one_message(pictures, tmp_path, llamas, capfd):
    vit(tmp_path / "vit")
    clip(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").unlink()
    wanda, shown = ("--pruner", "Wanda", "--pruner.sparsity", "0.5"), ("--pictures", str(pictures))
    wrong = {
        "is measured on pictures: give --pictures": (tmp_path / "vit", "--text", str(llamas / "text.txt")),
        "is measured on text: give --text": (llamas / "llama", *shown),
        "holds 8 pictures, and 9 are wanted": (tmp_path / "vit", *shown, "--samples", "9"),
        "no preprocessor_config.json": (tmp_path / "clip", *shown, "--samples", "2"),
        "through the tower 'vision' alone": (tmp_path / "clip", *shown, "--towers", "[text]"),
        "has no perplexity": (tmp_path / "vit", *shown, "--evaluate", str(llamas / "text.txt")),
        "need a loss": (tmp_path / "vit", *shown, "--allocation", "Ecoflap"),
    }
    for message, (model, *argv) in wrong.items():
        assert main(["prune", str(model), *wanda, *argv, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
        assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="holds 0 pictures"):
        drawn_pictures(tmp_path / "vit", 1, 0)


def test_pictures_are_drawn_without_replacement(pictures):
    first = [picture.path.name for picture in drawn_pictures(pictures, 8, 0)]
    assert sorted(first) == [f"{number}.png" for number in range(8)]
    assert [picture.path.name for picture in drawn_pictures(pictures, 3, 0)] == first[:3]
    assert [picture.path.name for picture in drawn_pictures(pictures, 8, 1)] != first
