"""Question: how does the guard get into a loop of several processes?

Data: see tinted_digits.py.
Command: torchrun --nproc-per-node 2 recipes/in_ddp.py
Expected: see README.md beside this file. Run time: half a minute on 2 CPU cores.
"""

import torch
from tinted_digits import GUARD, drawn, network, scores
from torch import distributed
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from concept_guard import ConceptGuard

distributed.init_process_group("gloo")  # "nccl" where every process has a GPU
rank, size = distributed.get_rank(), distributed.get_world_size()
train, probe = drawn()
model = network()
guard = ConceptGuard(  # in every process, after the group, before DDP, on the whole probe
    model, probe=DataLoader(probe, batch_size=128), config=GUARD
)
trained = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
sampler = DistributedSampler(train, seed=0)
for epoch in range(16):
    sampler.set_epoch(epoch)
    trained.train()
    for images, labels in DataLoader(train, batch_size=64 // size, sampler=sampler):
        losses = cross_entropy(trained(images), labels, reduction="none")
        guard.loss(losses, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        guard.step()

guard.bake()  # in every process too, so that all have the same weights
guard.close()
if rank == 0:
    print(scores(model))
distributed.destroy_process_group()
