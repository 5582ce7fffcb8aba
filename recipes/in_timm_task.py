"""Question: how does the guard get into a script that is built on timm.task?

Data: see tinted_digits.py.
Command: python recipes/in_timm_task.py
Expected: see README.md beside this file. Run time: half a minute on 2 CPU cores.
For an unchanged train.py of timm: --device-modules concept_guard.integrations.timm_auto
"""

import torch
from tinted_digits import GUARD, drawn, network, scores
from torch import nn
from torch.utils.data import DataLoader

from concept_guard.integrations.timm_task import ConceptGuardTask

train, probe = drawn()
model = network()
task = ConceptGuardTask(
    model, nn.CrossEntropyLoss(), probe=DataLoader(probe, batch_size=256), config=GUARD
)
optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), lr=0.002)
updates = 0
for _epoch in range(10):
    task.get_trainable_module().train()
    for images, labels in DataLoader(train, batch_size=64, shuffle=True):
        task(images, labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
        task.update_ema(step=updates)  # counts the update, as timm's own script does

checkpoint = task.get_checkpoint_state()  # what timm's CheckpointSaver writes
model = network()
model.load_state_dict(checkpoint["state_dict"])  # an ordinary network: the correction is in it
print(scores(model))
