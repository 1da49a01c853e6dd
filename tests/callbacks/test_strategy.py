"""One checkpoint folder for one process, DDP and FSDP2: saved by any, loaded by any, equal to the bit."""

import json
import shutil
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch.optim import AdamW
from torch.utils.data import TensorDataset

from fulgurite.callbacks.checkpoint_io import DigestCheckpointIO
from fulgurite.checkpoints import DamagedError, load_document, load_tensors, verify
from fulgurite.samples.loader import ResumableLoader
from fulgurite.samples.sampler import GlobalBatchSampler


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, pair):
    root = tmp_path_factory.mktemp("two_ranks")
    pair.run(Path(__file__).with_name("two_ranks.py"), root)
    results = [json.loads((root / f"results_{rank}.json").read_text()) for rank in range(2)]
    return root, root / "unbroken" / "checkpoints" / "epoch=0-step=4", results


def test_sharded_resume_is_bitwise_on_both_ranks(two_ranks):
    _, _, results = two_ranks
    for result in results:
        assert len(result["resumed"]) == 3
        assert result["resumed"] == result["unbroken"]
    assert results[0]["resumed"] != results[1]["resumed"]


def test_the_folder_holds_the_trained_part_whole(two_ranks):
    _, saved, _ = two_ranks
    assert verify(saved).ok
    shapes = {name: tuple(tensor.shape) for name, tensor in load_tensors(saved).items()}
    assert shapes == {
        "adapter.0.weight": (5, 16),
        "adapter.0.bias": (5,),
        "adapter.2.weight": (1, 5),
        "adapter.2.bias": (1,),
    }
    (optimizer,) = load_document(saved, "state")["optimizer_states"]
    assert [tuple(optimizer["state"][index]["exp_avg"].shape) for index in range(4)] == list(shapes.values())


@pytest.mark.parametrize("other", ["ddp_from_fsdp", "fsdp_from_ddp"])
def test_other_strategies_load_and_save_the_same(two_ranks, other):
    root, saved, _ = two_ranks
    assert_equal_state(saved, root / other)


def assert_equal_state(first, second):
    a, b = load_tensors(first), load_tensors(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = (load_document(path, "state")["optimizer_states"][0]["state"] for path in (first, second))
    assert a.keys() == b.keys() == set(range(len(a)))
    assert all(torch.equal(a[index][key], b[index][key]) for index in a for key in a[index])


def test_one_process_loads_it(two_ranks, tmp_path):
    _, saved, _ = two_ranks
    weights, (expected,) = load_tensors(saved), load_document(saved, "state")["optimizer_states"]

    class Plain(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.adapter = torch.nn.Sequential(torch.nn.Linear(16, 5), torch.nn.Dropout(), torch.nn.Linear(5, 1))

        def training_step(self, batch, index):
            raise AssertionError("nothing is left to train")

        def train_dataloader(self):
            return ResumableLoader(TensorDataset(torch.zeros(4, 16)), GlobalBatchSampler(4, 1))

        def configure_optimizers(self):
            return AdamW(self.parameters(), lr=0.01)

    module = Plain()
    fitter = pl.Trainer(
        accelerator="cpu",
        plugins=[DigestCheckpointIO()],
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    fitter.fit(module, ckpt_path=saved)
    assert all(torch.equal(weights[name], value) for name, value in module.state_dict().items())
    fitter.save_checkpoint(tmp_path / "again")
    assert_equal_state(saved, tmp_path / "again")
    assert expected["param_groups"][0]["lr"] == 0.01


def test_full_fine_tuning_stores_a_file_per_rank_and_resumes_bitwise(two_ranks):
    root, _, results = two_ranks
    saved = root / "full" / "checkpoints" / "epoch=0-step=4"
    assert verify(saved).ok
    assert verify(saved).extra == []
    files = {file.name for file in saved.iterdir()}
    assert {"shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"} < files
    # Nothing sharded is in the file of rank 0 as well: buffers only.
    assert load_file(saved / "weights.safetensors").keys() == {"seen"}
    for result in results:
        assert len(result["full resumed"]) == 3
        assert result["full resumed"] == result["full"]


@pytest.mark.parametrize("other", ["full_ddp_from_fsdp", "full_fsdp_from_ddp"])
def test_slices_are_read_whole_by_any_strategy(two_ranks, other):
    root, _, _ = two_ranks
    assert_equal_state(root / "full" / "checkpoints" / "epoch=0-step=4", root / other)


def test_the_sum_of_all_slices_is_every_ranks_own(two_ranks):
    root, _, _ = two_ranks
    weights = load_tensors(root / "full_filled")
    (optimizer,) = load_document(root / "full_filled", "state")["optimizer_states"]
    rows = torch.tensor([100.0] * 8 + [200] * 8)
    assert torch.equal(weights["backbone.weight"], rows[:, None].expand(16, 8))
    assert weights["adapter.0.bias"].tolist() == [103, 103, 103, 203, 203]
    assert weights["adapter.2.weight"].unique().tolist() == [104]
    assert optimizer["state"][3]["exp_avg"].tolist() == [1003, 1003, 1003, 2003, 2003]
    assert torch.equal(
        load_tensors(root / "full_filled", names=["adapter.0.bias"])["adapter.0.bias"], weights["adapter.0.bias"]
    )


def test_where_one_rank_cannot_write_all_raise_and_the_old_checkpoint_stays(two_ranks):
    root, _, results = two_ranks
    assert [result["refused"] for result in results] == ["cannot write the slices of rank 1: no space left"] * 2
    assert verify(root / "full_filled").ok
    assert not [file.name for file in root.iterdir() if file.name.startswith(".")]


def test_a_flipped_bit_in_a_slice_is_found_and_named(two_ranks, tmp_path):
    root, _, _ = two_ranks
    copy = tmp_path / "copy"
    shutil.copytree(root / "full_filled", copy)
    shard = copy / "shard-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 16
    shard.write_bytes(data)
    with pytest.raises(DamagedError, match=r"shard-00001-of-00002.safetensors is damaged: tensor '\w+/"):
        (load_tensors(copy), load_document(copy, "state"))
    assert not verify(copy).ok


@pytest.mark.parametrize("saved", ["ddp", "fsdp2"])
@pytest.mark.parametrize("resumed", ["ddp", "fsdp2"])
def test_from_inside_an_accumulation_window_the_sum_goes_on(saved, resumed, two_ranks):
    """To the bit with the same strategy; with the other one up to the rounding of another order of sums."""
    _, _, results = two_ranks
    for result in results:
        if saved == resumed:
            assert result[f"{resumed} from {saved}"] == result[f"{resumed} whole"]
        else:
            assert result[f"{resumed} from {saved}"] == pytest.approx(result[f"{saved} whole"], rel=1e-5)


def test_every_ranks_slice_is_in_the_file(two_ranks):
    """Each rank filled its slices with a value of its own: rows 0-2 on rank 0 and 3-4 on rank 1."""
    root, _, _ = two_ranks
    weights, (optimizer,) = (
        load_tensors(root / "filled"),
        load_document(root / "filled", "state")["optimizer_states"],
    )
    assert weights["adapter.0.weight"][:, 0].tolist() == [100, 100, 100, 200, 200]
    assert weights["adapter.0.bias"].tolist() == [101, 101, 101, 201, 201]
    assert optimizer["state"][1]["exp_avg"].tolist() == [1001, 1001, 1001, 2001, 2001]
    assert weights["adapter.2.weight"].unique().tolist() == [102]


def test_validation_under_fsdp_of_the_saved_weights(two_ranks):
    _, saved, results = two_ranks
    metrics = json.loads((saved / "manifest.json").read_text())["metrics"]
    assert results[0]["val"] == results[1]["val"] == pytest.approx(metrics["val/loss"], abs=1e-7)
