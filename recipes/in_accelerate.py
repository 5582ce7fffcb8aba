"""Question: how does the guard get into a loop with Accelerate?

Data: see tinted_digits.py. Needs: pip install ".[hf]"
Command: python recipes/in_accelerate.py, or torchrun --nproc-per-node 2 recipes/in_accelerate.py
Expected: see README.md beside this file. Run time: half a minute on 2 CPU cores.
"""

import torch
from accelerate import Accelerator
from tinted_digits import GUARD, drawn, network, scores
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from concept_guard import ConceptGuard

train, probe = drawn()
accelerator, model = Accelerator(cpu=True), network()
guard = ConceptGuard(model, probe=DataLoader(probe, batch_size=256), config=GUARD)  # before prepare
optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
loader = DataLoader(train, batch_size=64 // accelerator.num_processes, shuffle=True)
prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
accelerator.register_for_checkpointing(guard)  # save_state and load_state carry it
for _epoch in range(10):
    prepared.train()
    for images, labels in loader:
        losses = cross_entropy(prepared(images), labels, reduction="none")
        accelerator.backward(guard.loss(losses, labels))
        optimizer.step()
        optimizer.zero_grad()
        guard.step()

guard.bake()
guard.close()
accelerator.print(scores(model))
