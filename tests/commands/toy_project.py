"""A user's own project: a module and data that live outside the package and are admitted by --allow."""

import os
import signal
import time

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    """A linear model; ``lr`` and ``width`` are what the tests change."""

    def __init__(self, width: int = 4, lr: float = 0.1, activation: nn.Module | None = None, refuse: bool = False):
        super().__init__()
        if refuse:
            raise ValueError("refuse=True is refused")
        self.save_hyperparameters()
        self.lr = lr
        self.layer = nn.Linear(width, 1)
        self.activation = activation or nn.Identity()

    def loss(self, batch):
        return self.activation(self.layer(batch[0])).square().mean()

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch, index):
        self.log("test/loss", self.loss(batch))

    def predict_step(self, batch, index):
        return [{"id": int(row[0]), "answer": value} for row, value in zip(batch[0], self.layer(batch[0])[:, 0])]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


class Plain(Net):
    """Saves no hyper-parameters."""

    def save_hyperparameters(self):
        pass


class Slow(Net):
    """Says which step it is at, and takes its time."""

    def training_step(self, batch, index):
        print("step", self.trainer.global_step, flush=True)
        time.sleep(0.1)
        return super().training_step(batch, index)


class Diverging(Net):
    """The loss is NaN from the second step on."""

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return loss * float("nan") if self.trainer.global_step >= 1 else loss


class Interrupted(Net):
    """The user presses Ctrl-C in the first step."""

    def training_step(self, batch, index):
        raise KeyboardInterrupt


class Terminated(Net):
    """A scheduler sends SIGTERM in one step."""

    def __init__(self, at_step: int = 0, lr: float = 0.1):
        super().__init__(lr=lr)
        self.at_step = at_step

    def training_step(self, batch, index):
        if self.trainer.global_step == self.at_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, index)

    def test_step(self, batch, index):
        os.kill(os.getpid(), signal.SIGTERM)
        super().test_step(batch, index)


class Tuples(Net):
    """Predicts something that cannot be written."""

    def predict_step(self, batch, index):
        return batch[0]


class Broken(Net):
    """Fails in a step, or before the first one."""

    def __init__(self, at_step: int = -1, lr: float = 0.1):
        super().__init__(lr=lr)
        self.at_step = at_step

    def on_fit_start(self):
        if self.at_step < 0:
            raise RuntimeError("broken")

    def training_step(self, batch, index):
        if self.trainer.global_step == self.at_step:
            raise RuntimeError("broken")
        return super().training_step(batch, index)

    def test_step(self, batch, index):
        raise RuntimeError("broken")


class Data(LightningDataModule):
    """``size`` fixed rows; the first number of each is its index."""

    def __init__(self, width: int = 4, size: int = 12, batch_size: int = 4):
        super().__init__()
        self.width, self.size, self.batch_size = width, size, batch_size

    def train_dataloader(self):
        rows = torch.randn(self.size, self.width, generator=torch.Generator().manual_seed(0))
        rows[:, 0] = torch.arange(self.size)
        return DataLoader(TensorDataset(rows), batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
