"""Question: how does the guard get into a Lightning module?

Data: see tinted_digits.py. Needs: pip install ".[lightning]"
Command: python recipes/in_lightning.py
Expected: see README.md beside this file. Run time: half a minute on 2 CPU cores.
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from tinted_digits import GUARD, drawn, network, scores
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from concept_guard.integrations.lightning import ConceptGuardCallback


class Classifier(LightningModule):
    """An ordinary module, but for the losses per sample, which the guard may weigh."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return the losses of a batch."""
        images, labels = batch
        return cross_entropy(self.model(images), labels, reduction="none")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.model.parameters(), lr=0.002)


train, probe = drawn()
module = Classifier()
callback = ConceptGuardCallback(DataLoader(probe, batch_size=256), GUARD)
trainer = Trainer(
    max_epochs=10,
    accelerator="cpu",
    callbacks=[callback],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True))
print(scores(module.model))
