"""Any method of the package in a Lightning training: a callback with the three hooks (needs `pip install lightning`).

python examples/lightning_callback.py
"""

import argparse

import lightning as L
import torch
from distill_and_prune import network
from prune_pretrained import accuracy, digits
from torch.utils.data import DataLoader, TensorDataset

import sparsekd
from sparsekd.methods import Method


class Prune(L.Callback):
    """Calls a method where a training loop would. Make the method before the optimizers."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            self.method.attach(optimizer)

    def on_train_batch_end(self, *_: object) -> None:
        self.method.after_step()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        event = self.method.after_boundary(trainer.current_epoch + 1)
        if event:
            print(event)


class Student(L.LightningModule):
    def __init__(self, method: Method) -> None:
        super().__init__()
        self.network, self.method = method.student, method

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        x, y = batch
        return self.method.loss((x,), y).total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([*self.network.parameters(), *self.method.parameters()], lr=0.05, momentum=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    L.seed_everything(0, verbose=False)
    x, y = digits()
    student = network(32)
    plain = sparsekd.distill.Plain(student, sparsekd.Classification())  # or a Distiller, with a teacher
    schedule = sparsekd.LinearSchedule(rate=0.3, every=max(1, options.epochs // 4), final=0.6, unit="macs")
    method = sparsekd.SPSAD(plain, schedule, epochs=options.epochs, exclude=["0", "12"], example_inputs=(x[:1],))
    trainer = L.Trainer(
        max_epochs=options.epochs, callbacks=[Prune(method)], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Student(method), DataLoader(TensorDataset(x[300:], y[300:]), 64, shuffle=True, drop_last=True))
    print(f"accuracy {accuracy(student, x[:300], y[:300]):.3f}")


if __name__ == "__main__":
    main()
