"""The backbone that a run has trained, as the start of another backbone."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fulgurite.backbones.frames import TimmFrameEncoder
from fulgurite.backbones.llava import Llava
from fulgurite.backbones.run_weights import fill_from_run
from fulgurite.backbones.sources import weights_filled_later
from fulgurite.checkpoints import MismatchError, MissingError, newest_checkpoint, save_checkpoint_folder
from fulgurite.checkpoints.store import load_tensors

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGS = Path(__file__).parents[2] / "configs"
SHAPE = {"vocab_size": 30522, "pad_token_id": 0, "eos_token_id": 102, "hidden_size": 32, "intermediate_size": 32}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Eight captioned pictures, the same in every split."""
    root, rng = tmp_path_factory.mktemp("album"), np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / f"{number}.png")
    rows = [json.dumps({"image": f"{number}.png", "text": f"picture {number}"}) for number in range(8)]
    for split in ("train", "val", "test"):
        (root / f"{split}.jsonl").write_text("\n".join(rows))
    return root


def fit(album, run, *options):
    """A run of two steps over the tiny model."""
    from fulgurite.cli import main

    for name in ("lightning", "lightning.pytorch"):  # whose handlers keep the stream of another test
        logging.getLogger(name).handlers = []
    quiet = ("--trainer.enable_progress_bar=false", "--trainer.logger=false", "--test_after_fit=false")
    files = ("adapters/emoji_captions.yaml", "tiny/llava.yaml")
    layers = [part for file in files for part in ("--config", str(CONFIGS / file))]
    given = (f"--data.root={album}", "--data.feature_cache=null", "--trainer.max_epochs=1", f"--run={run}")
    assert main(["fit", *layers, *given, *quiet, *options]) == 0
    return run


@pytest.fixture(scope="module")
def learned(album, tmp_path_factory):
    """A run that trained the backbone itself."""
    return fit(album, tmp_path_factory.mktemp("runs") / "learned", "--model.adapters=null")


def build(**options):
    encoder = TimmFrameEncoder("test_efficientnet", weights=None, size=64, grid=2)
    return Llava(**{"pretrained": False, "config": SHAPE, "encoder": encoder, **options})


def test_a_backbone_begins_where_a_run_ended(learned):
    fresh, found, newest = build(), build(checkpoint=learned), newest_checkpoint(learned)
    written = load_tensors(newest)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, written[f"backbone.{name}"])
    changed = {n for n, t in fresh.state_dict().items() if not torch.equal(t, found.state_dict()[n])}
    assert {"projector.0.weight", "language.model.layers.0.mlp.down_proj.weight"} <= changed
    assert not any(name.startswith("encoder.") for name in changed)
    assert found.fingerprint == build(checkpoint=newest).fingerprint != fresh.fingerprint
    assert found.source == str(learned)
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_a_run_on_a_learned_backbone_names_it_and_reads_back_without_it(learned, album, tmp_path):
    import fulgurite

    option = f"--model.backbone.init_args.checkpoint={learned}"
    folder = newest_checkpoint(fit(album, tmp_path / "run", option))
    module = fulgurite.load(folder)
    assert module.base_digest == build(checkpoint=learned).fingerprint
    with pytest.raises(MismatchError, match=f"is a delta over {learned}"):
        build(checkpoint=folder)


def test_what_does_not_fit_is_refused_and_changes_nothing(learned, tmp_path):
    model = build()
    before, good = model.fingerprint, load_tensors(newest_checkpoint(learned))
    name = "backbone.projector.0.bias"
    cases = {
        "projector.0.bias: file .3,., model .32,.": {**good, name: torch.zeros(3)},
        "projector.0.bias: missing": {key: value for key, value in good.items() if key != name},
        "backbone to what the run was made with|in the file, not in the model": {**good, "backbone.x": torch.zeros(1)},
        "1 tensors of adapters": {**good, "bank.sets.live.x": torch.zeros(1)},
    }
    for number, (error, tensors) in enumerate(cases.items()):
        save_checkpoint_folder(tmp_path / str(number), {"weights": tensors})
        with pytest.raises(MismatchError, match=error):
            fill_from_run(model, tmp_path / str(number))
    entry = {"class": "torch.nn.modules.linear.Linear", "arguments": {"in_features": 1, "out_features": 1}}
    save_checkpoint_folder(
        tmp_path / "built", {"weights": good}, structure={"modules": {"backbone.projector.0": entry}}
    )
    with pytest.raises(MismatchError, match="1 modules that its backbone's class does not make"):
        fill_from_run(model, tmp_path / "built")
    with pytest.raises(MissingError, match=r"backbone\.init_args\.checkpoint="):
        fill_from_run(model, tmp_path)
    model.refresh()
    assert model.fingerprint == before


def test_files_need_not_be_there_where_all_weights_are_filled_later(tmp_path):
    with weights_filled_later():
        assert build(checkpoint=tmp_path / "gone").source == str(tmp_path / "gone")
