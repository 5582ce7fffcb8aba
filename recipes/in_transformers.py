"""Question: how does the guard get into the Trainer of Transformers?

Data: see tinted_digits.py. Needs: pip install ".[hf]"
Command: python recipes/in_transformers.py
Expected: see README.md beside this file. Run time: half a minute on 2 CPU cores.
"""

import tempfile

import torch
from tinted_digits import GUARD, drawn, network, scores
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from concept_guard.integrations.transformers import ConceptGuardCallback


class Model(nn.Module):
    """Answers as models of Transformers do; `TimmWrapperForImageClassification` is one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.timm_model = network()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the logits; the Trainer keeps the labels of a batch because they stand here."""
        del labels
        return {"logits": self.timm_model(pixel_values)}


train, probe = drawn()
model = Model()
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=10,
        per_device_train_batch_size=64,
        learning_rate=0.002,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    callback = ConceptGuardCallback(model.timm_model, DataLoader(probe, batch_size=256), GUARD)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"pixel_values": x, "labels": y} for x, y in train],
        callbacks=[callback],
        compute_loss_func=callback.compute_loss,
    )
    trainer.train()
print(scores(model.timm_model))
