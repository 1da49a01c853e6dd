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
