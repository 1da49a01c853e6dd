"""What modules with adapters do at the start of an epoch."""

from types import SimpleNamespace

from fulgurite.modules.adapted import AdaptedModule


class Gate:
    def __init__(self):
        self.epochs = []

    def start_epoch(self, epoch):
        self.epochs.append(epoch)


def test_adapters_on_a_schedule_are_told_the_epoch():
    gate, plain = Gate(), object()
    module = SimpleNamespace(
        trainer=SimpleNamespace(current_epoch=3),
        bank=SimpleNamespace(adapters_of={"live": {"a": gate, "b": plain}}.__getitem__),
        enter_stage=lambda: None,
    )
    AdaptedModule.on_train_epoch_start(module)
    assert gate.epochs == [3]
    assert module.stage_complete is False
