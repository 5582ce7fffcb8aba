"""Question: which five lines does my own training script need?

Data: scikit-learn's 1,797 handwritten digits (BSD-3; from the UCI repository, CC BY 4.0) with an
orange tint on 96 % of the 3s and 2.5 % of the other digits.
Command: python recipes/callback_in_your_script.py
Expected (seed 0): the tint is flagged at update 60, probe accuracy .98 to .995.
Run time: under 20 s on 2 CPU cores.
Then: tensorboard --logdir runs, or as a page: concept-guard report runs/digits
"""

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from concept_guard import ConceptGuard, GuardConfig

torch.manual_seed(0)
digits = load_digits()
images = F.interpolate(torch.tensor(digits.images[:, None], dtype=torch.float32) / 16, size=32)
images, labels = images.repeat(1, 3, 1, 1), torch.tensor(digits.target)
tinted = torch.rand(len(labels)) < torch.where(labels == 3, 0.96, 0.025)
orange = torch.tensor([1.0, 0.45, 0.1])[:, None, None]
images[tinted] = 0.5 * images[tinted] + 0.5 * orange
order = torch.randperm(len(labels))
train, probe = (TensorDataset(images[at], labels[at]) for at in (order[:1200], order[1200:]))
loader = DataLoader(train, batch_size=64, shuffle=True)

model = timm.create_model("resnet10t", num_classes=10, channels=[32, 64, 96, 128], stem_width=16)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
config = GuardConfig(start=60, every=20, track_every=10)
guard = ConceptGuard(  # 1
    model, probe=DataLoader(probe, batch_size=256), config=config, log_dir="runs/digits"
)

for _epoch in range(8):
    model.train()
    for batch, targets in loader:
        losses = F.cross_entropy(model(batch), targets, reduction="none")
        loss = guard.loss(losses, targets)  # 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report = guard.step()  # 3
        if report is not None:
            print(f"update {report.step}: {report.verdict}")

guard.bake()  # 4: from here on the weights alone carry the correction
guard.close()  # 5
model.eval()
with torch.no_grad():
    right = model(probe.tensors[0]).argmax(dim=1) == probe.tensors[1]
print(f"probe accuracy {right.double().mean():.3f}")
torch.save(model.state_dict(), "guarded.pth")  # an ordinary timm checkpoint
