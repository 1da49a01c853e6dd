import importlib
import json
import logging

import av
import numpy as np
import pytest

# Lightning cuts its loggers off where it is imported before pytest listens; then caplog hears nothing.
for name in ("lightning.pytorch", "lightning.fabric"):
    importlib.import_module(name)
    logging.getLogger(name).propagate = True

DOMAINS = ("red", "green", "blue")
SIZES = {"train": 20, "val": 6, "test": 7}
LONG = ("test_resume.py", "test_two_processes.py")


def pytest_collection_modifyitems(items):
    """Files that take minutes come first, so that parallel workers end together."""
    items.sort(key=lambda item: item.path.name not in LONG)


def write_clip(path, channel, seed):
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for t in range(4):
            picture = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            picture[8 * t : 8 * t + 24, 8 : 32 + 8 * (seed % 3), channel] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def stream_folder(tmp_path_factory):
    """Three domains of little videos with questions, in the layout of JsonlDataModule."""
    root = tmp_path_factory.mktemp("stream")
    for channel, domain in enumerate(DOMAINS):
        folder = root / domain
        folder.mkdir()
        for clip in range(6):
            write_clip(folder / f"{clip}.mp4", channel, clip)
        for split, size in SIZES.items():
            rows = [
                {
                    "id": f"{split}{i}",
                    "video": f"{i % 6}.mp4",
                    "question": f"How wide is the {domain} box?" if i % 2 else f"Is the {domain} box wide?",
                    "answer": f"size {i % 3}" if i % 2 else ("yes" if i % 3 else f"no {domain}"),
                    "kind": "size" if i % 2 else "yesno",
                }
                for i in range(size)
            ]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


CONFIG = """\
seed_everything: 0
test_after_fit: true
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: -1
  gradient_clip_val: 1.0
  reload_dataloaders_every_n_epochs: 1
  use_distributed_sampler: false
  log_every_n_steps: 1
  enable_progress_bar: false
model:
  class_path: ContinualVideoQA
  init_args:
    backbone:
      class_path: PrefixEncoder
      init_args:
        pretrained: false
        text_config: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}
        routing_layer: -2
        frame_encoder:
          class_path: TimmFrameEncoder
          init_args: {model: test_efficientnet, weights: null, pretrained: false, size: 64, grid: 2}
        num_frames: 2
    adapters:
      - points: [attention_output, feed_forward_output]
        kind: {class_path: Bottleneck, init_args: {reduction: 8, dropout: 0.2}}
      - points: [video_projection]
        kind: Replace
    second_router: {class_path: CentroidRouter, init_args: {normalize_parts: true}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1e-2}}
data:
  class_path: ContinualDataModule
  init_args:
    domains: [%s]
    epochs_per_domain: 2
    batch_size: 10
"""


@pytest.fixture(scope="session")
def stream_config(stream_folder, tmp_path_factory):
    """The config of a run over the stream: 3 stages of 2 epochs of 2 steps, with dropout."""
    splits = ", ".join(f"{split}: {split}.jsonl" for split in SIZES)
    data = "{class_path: JsonlDataModule, init_args: {root: %s, domain: %s, %s}}"
    domains = ", ".join(data % (json.dumps(str(stream_folder / name)), name, splits) for name in DOMAINS)
    path = tmp_path_factory.mktemp("configs") / "stream.yaml"
    path.write_text(CONFIG % domains)
    return path


@pytest.fixture
def compared_in_process(monkeypatch):
    """Exports without a process of their own for the comparison, which takes seconds to start."""
    from fulgurite.backbones import reload
    from fulgurite.modules import export_files

    def compare(library, folder, inputs, expected, model_class="", base="", stored="dense"):
        names = ("library", "folder", "model_class", "base", "stored")
        request = dict(zip(names, (library, str(folder), model_class, base, stored)))
        named = {f"input.{n}": t for n, t in inputs.items()} | {f"output.{n}": t for n, t in expected.items()}
        return reload.compare(request, named)

    monkeypatch.setattr(export_files, "compare_fresh", compare)
