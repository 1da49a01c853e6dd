"""A linear model with dropout and fixed data that meet the fault they are told to, in the step and rank told."""

import os
import signal
import sys
import time

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fulgurite.datamodules.base import FulguriteDataModule
from fulgurite.samples import DataInfo, Sample
from fulgurite.samples.loader import ResumableLoader
from fulgurite.samples.sampler import GlobalBatchSampler


def meet(fault: str) -> None:
    """Do to this process what ``fault`` says: the name of a signal, ``raise``, ``exit`` or ``leave``."""
    for word in filter(None, fault.split("+")):
        if word == "raise":
            raise RuntimeError("the fault of this test")
        if word == "exit":
            sys.exit(0)
        if word == "leave":
            os._exit(0)
        os.kill(os.getpid(), signal.Signals[word])
        time.sleep(0.05)


class Net(LightningModule):
    """Linear regression under dropout.

    Args:
        fault: see `meet`; one for each rank, with slashes between them; in training step ``at``.
        pause: seconds that a step takes.
    """

    def __init__(self, lr: float = 0.1, fault: str = "", at: int = -1, pause: float = 0.0):
        super().__init__()
        self.lr, self.faults, self.at, self.pause = lr, fault.split("/"), at, pause
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3), nn.Linear(5, 1))

    def loss(self, batch):
        return (self.net(batch[:, :6]) - batch[:, 6:]).square().mean()

    def training_step(self, batch, index):
        if self.trainer.global_step == self.at and self.global_rank < len(self.faults):
            meet(self.faults[self.global_rank])
        time.sleep(self.pause)
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val/loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr)


class Rows(Dataset):
    """Rows of a fixed table; an index past its end is a repeat."""

    def __init__(self, size: int, fault: str = "", at: int = -1):
        self.rows = torch.randn(size, 7, generator=torch.Generator().manual_seed(0))
        self.fault, self.at, self.read = fault, at, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.read += 1
        if self.read == self.at:
            meet(self.fault)
        return self.rows[index % len(self.rows)]


class Data(LightningDataModule):
    """``size`` rows in an order of their own in every epoch; ``fault`` when the ``at``-th row is read."""

    def __init__(self, size: int = 24, batch_size: int = 8, fault: str = "", at: int = -1):
        super().__init__()
        self.size, self.batch_size, self.fault, self.at = size, batch_size, fault, at

    def train_dataloader(self):
        rank, world = self.trainer.global_rank, self.trainer.world_size
        order = GlobalBatchSampler(self.size, self.batch_size, rank, world, shuffle=True, seed=3)
        return ResumableLoader(Rows(self.size, self.fault, self.at), order)

    def val_dataloader(self):
        return DataLoader(Rows(8), batch_size=4, generator=torch.Generator())


class Answered(Data, FulguriteDataModule):
    """The same rows, said to be these samples."""

    def __init__(self, answer: str = "yes"):
        super().__init__()
        self.answer = answer

    def read(self, split):
        return [Sample(id=f"{split}{i}", domain="one", question="?", answers={self.answer: 1.0}) for i in range(3)]

    def info(self):
        return DataInfo(domains=("one",))

    def setup(self, stage):
        """Nothing to collate."""
