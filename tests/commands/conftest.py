import json
import logging
import random
import sys
from pathlib import Path

import pytest

TOYS = Path(__file__).parent

CONFIG = """\
model: {class_path: toy_project.Net, init_args: {lr: 1e-3}}
data: {class_path: toy_project.Data}
trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false, log_every_n_steps: 1}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working folder with toy.yaml, and the toy project on the import path."""
    monkeypatch.syspath_prepend(str(TOYS))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(CONFIG)
    yield tmp_path
    sys.modules.pop("toy_project", None)


@pytest.fixture
def cli(project, capfd, caplog, monkeypatch):
    """Run a command in this process; gives (exit code, stdout, stderr with the log)."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        # Their handlers keep the stream of the test that imported Lightning, which is closed by now.
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    from fulgurite.cli import main

    def run(command, *argv):
        allow = ("--allow", "toy_project") if command in ("fit", "validate", "test", "predict") else ()
        caplog.clear()
        code = main([command, *argv, *allow])
        out, err = capfd.readouterr()
        return code, out, "\n".join([*caplog.messages, err])

    return run


@pytest.fixture(scope="session")
def llamas(tmp_path_factory):
    """Folders ``llama`` and ``bfloat16`` of a tiny model with a tokenizer of letters, and ``text.txt``."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    root, letters = tmp_path_factory.mktemp("models"), "abcdefgh ."
    numbers = {letter: number for number, letter in enumerate(["<unk>", *letters, "\n"])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    for name, dtype in (("llama", torch.float32), ("bfloat16", torch.bfloat16)):
        model.to(dtype).save_pretrained(root / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(root / name)
    draw = random.Random(0)
    (root / "text.txt").write_text("".join(draw.choice(letters) for _ in range(3000)))
    return root


@pytest.fixture
def in_process(monkeypatch):
    """What is compressed is loaded and compared in this process, where starting another one is not the point."""
    from fulgurite.backbones import reload
    from fulgurite.modules import compressed_files

    def compare(library, folder, inputs, expected, model_class="", base="", stored="dense"):
        request = {"library": library, "folder": str(folder), "model_class": model_class, "base": "", "stored": stored}
        tensors = {f"input.{n}": t for n, t in inputs.items()} | {f"output.{n}": t for n, t in expected.items()}
        return reload.compare(request, tensors)

    monkeypatch.setattr(compressed_files, "compare_fresh", compare)


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PICTURE = {"image_size": 16, "patch_size": 8}
TEXT = {"vocab_size": 16, "max_position_embeddings": 14, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
CAPTIONS = ("a dab", "bad cab", "he had a bag", "cafe", "a big head", "abc", "fed", "high hedge")


def save_tokenizer(folder):
    """One of letters, that puts its ends around a caption."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = {token: number for number, token in enumerate(["<pad>", "<bos>", "<unk>", "<eos>", *"abcdefgh "])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A <eos>", None, [("<bos>", 1), ("<eos>", 3)])
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "unk", "eos")}
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    whole.save_pretrained(folder)
    return whole


def make_transformers(root):
    import transformers
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel, ViTConfig, ViTForImageClassification

    both = {"text_config": SIZES | TEXT, "vision_config": SIZES | PICTURE}
    models = {
        "ViT": ViTForImageClassification(ViTConfig(**SIZES, **PICTURE)),
        "CLIP": CLIPModel(CLIPConfig(**both, projection_dim=8)),
        "Siglip": SiglipModel(SiglipConfig(**both)),  # it pools by an attention whose keys are not its queries
    }
    size = {"height": 16, "width": 16}
    for name, model in models.items():
        folder = root / name.lower()
        model.save_pretrained(folder)
        getattr(transformers, f"{name}ImageProcessor")(size=size, do_center_crop=False).save_pretrained(folder)
    save_tokenizer(root / "siglip")
    # A whole processor of one file, as CLIP's own folders have it.
    images = transformers.AutoImageProcessor.from_pretrained(root / "clip")
    (root / "clip" / "preprocessor_config.json").unlink()
    transformers.CLIPProcessor(images, save_tokenizer(root / "clip")).save_pretrained(root / "clip")


def make_open_clip(folder):
    import open_clip

    from fulgurite.checkpoints.tensorfile import write_tensors

    folder.mkdir()
    vision = {"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
    text = {"layers": 2, "width": 16, "heads": 2, "context_length": 8, "vocab_size": 49408}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    write_tensors(folder / "open_clip_model.safetensors", model.state_dict())


@pytest.fixture(scope="session")
def image_models(tmp_path_factory):
    """Folders ``vit``, ``clip``, ``siglip``, ``timm`` and ``open_clip`` of tiny models."""
    import timm
    import torch

    from fulgurite.backbones.foreign_models import write_model

    root = tmp_path_factory.mktemp("image_models")
    torch.manual_seed(0)
    make_transformers(root)
    make_open_clip(root / "open_clip")
    (root / "timm").mkdir()
    model = timm.create_model("test_vit", pretrained=False).eval()
    write_model("timm", model, root / "timm", architecture="test_vit")
    return root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Eight pictures in two folders, and ``pairs.jsonl`` with a caption of each."""
    import torch
    from PIL import Image

    root = tmp_path_factory.mktemp("pictures")
    generator, rows = torch.Generator().manual_seed(0), []
    for number, caption in enumerate(CAPTIONS):
        name = f"{number % 2}/{number}.png"
        (root / name).parent.mkdir(exist_ok=True)
        pixels = torch.randint(256, (20, 24, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(root / name)
        rows.append({"image": name, "text": caption})
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root
