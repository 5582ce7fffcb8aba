"""Stage 4b: training images that have a concept, or lack it, whatever their class.

Nothing here knows why concepts are corrected, or what the network makes of the images.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from concept_guard.config import GuardConfig
from concept_guard.counterfactual import Counterfactual
from concept_guard.effects import LEFT, Effect, Sample, effect_of, sampled
from concept_guard.probe import Batches
from concept_guard.reading import Reading
from concept_guard.tracking import Tracked

SHARE = 0.9  # of the training images that are edited; half of them are to have the concept
POSITIONS = 1024  # in the batches of all processes that get random numbers of their own


class Augmentation:
    """Puts concepts under correction into training images at random, and takes them out.

    Of the images that are edited half are to have a concept and half are not, whatever their
    class: it says little about the class any more, and the network need not learn it at all. This
    acts where a concept can be read from the values of images at fixed places, in images that were
    left out as well, and where little of an image is lost below it.

    Source: Plumb et al. (2022), arXiv 2106.02112 (a spurious pattern is put into images of some
    classes and taken out of others, by the masks of an object detector or a person).
    Departure: nobody names the pattern or draws a mask. What it does to images is estimated within
    classes from those that the guard holds for its carriers, as an affine map of every value; and
    images are drawn anew for every update. Marked CIFAR-10 test images, the default actions without
    it and with it: a patch .570, .622 (five seeds each), a tint .442 (five), .575 (three), both at
    once .528 and .427 (four), .560 and .554 (two); benchmarks/README.md.

    Args:
        probe: The probe, in which the concepts are.
        config: Settings of the guard; nothing is edited unless `augment` is among its actions.

    Attributes:
        problem: Why the last images could not be edited; empty if they could.
        remembers: Whether it is remembered what images carried before they were edited.
        carried: Concept id to `(B,)` bool, which of the last images carried it, by their values.
    """

    def __init__(self, probe: Batches, config: GuardConfig) -> None:
        self._probe, self._config = probe.alone, config
        self._effects: dict[int, Effect] = {}
        self._maps: tuple[Counterfactual, ...] = ()
        self._ids: tuple[int, ...] = ()
        self._shape = torch.Size()
        self._first = probe.ranks.rank * (POSITIONS // max(1, probe.ranks.size))
        self._draws = torch.Generator().manual_seed(config.seed)
        self._numbers = torch.empty(0, 3, POSITIONS)
        self.problem = ""
        self.remembers = False
        self.carried: dict[int, Tensor] = {}

    @property
    def acting(self) -> bool:
        """Whether images are edited now."""
        return bool(self._maps)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is done here about every concept under correction, in a sentence."""
        return tuple(f"concept {i}: {self._said(i)}" for i in self._effects)

    def _said(self, concept: int) -> str:
        effect = self._effects[concept]
        if effect.map is None or concept in self._ids:
            return effect.said
        return f"{LEFT}those with it are of another size than those with concept {self._ids[0]}"

    def follow(
        self, concepts: Sequence[Tracked], reading: Reading | None, device: torch.device
    ) -> None:
        """Edit images for these concepts from now on, and for no other.

        What one does to images is estimated when it comes, and again when other images carry it.

        Args:
            concepts: With their carriers among the images of the probe.
            reading: Of the probe; None if no concept is new.
            device: Where images are edited.
        """
        if "augment" not in self._config.action:
            return
        known = {i: effect.sample for i, effect in self._effects.items()}
        samples = {t.concept: known[t.concept] for t in concepts if t.concept in known}
        if reading is not None:
            for t in concepts:
                carried, before = t.carriers.any(dim=1).cpu(), samples.get(t.concept)
                if len(carried) != len(reading.indices):
                    continue  # carriers of another reading
                if before is None or before.is_stale(reading.indices.cpu(), carried):
                    samples[t.concept] = sampled(reading, carried, self._config.seed)
        self._take(samples, device)

    def _take(self, samples: Mapping[int, Sample], device: torch.device) -> None:
        """Edit images for the concepts that have these samples, estimating what is not known."""
        effects = {i: e for i, e in self._effects.items() if e.sample is samples.get(i)}
        for i in samples.keys() - effects.keys():
            effects[i] = effect_of(self._probe, samples[i]).to(device)
        self._effects = {i: effects[i] for i in sorted(samples)}
        acting = {i: e for i, e in self._effects.items() if e.map is not None}
        self._shape = next((effect.shape for effect in acting.values()), torch.Size())
        acting = {i: e for i, e in acting.items() if e.shape == self._shape}
        self._ids = tuple(acting)
        self._maps = tuple(effect.map for effect in acting.values() if effect.map is not None)
        self.carried = {}
        if len(self._numbers) != len(acting):
            self._numbers = torch.ones(len(acting), 3, POSITIONS, device=device)

    def draw(self, strength: float) -> None:
        """Draw random numbers for the images of the next update.

        Args:
            strength: Share of the editing that is to be done by now.
        """
        if self._maps:
            drawn = torch.rand(self._numbers.shape, generator=self._draws)
            drawn[:, 0] = (drawn[:, 0] >= SHARE * strength).float()  # 0 for what is edited
            self._numbers.copy_(drawn)  # in place: nothing recompiles

    def __call__(self, images: Tensor) -> Tensor:
        """Return training images as the network is to see them.

        Args:
            images: `(B, ...)` as the model is called with them.

        Returns:
            As many, edited, in the same memory format; the same object where nothing is.
        """
        if not self._maps:
            return images
        fits = images.shape[1:] == self._shape and images.is_floating_point()
        self.problem = "" if fits else _misfit(images, self._shape)
        self.carried = {}
        if not fits:
            return images
        is_last = images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last)
        if self.remembers:
            with torch.autocast(images.device.type, enabled=False):
                carried = [there.carried(images) for there in self._maps]
            self.carried = dict(zip(self._ids, carried, strict=True))
        at = (self._first + torch.arange(len(images), device=images.device)) % POSITIONS
        with torch.autocast(images.device.type, enabled=False):
            for numbers, there in zip(self._numbers, self._maps, strict=True):
                kept, wanted, donor = numbers[:, at]
                donors = (donor * len(images)).long().clamp(max=len(images) - 1)
                images = there.edited(images, kept < 0.5, wanted < 0.5, donors)
        return images.contiguous(memory_format=torch.channels_last) if is_last else images

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs; effects are estimated again, from the same images.

        Returns:
            Tensors and plain data.
        """
        return {
            "samples": {i: effect.sample.as_dict() for i, effect in self._effects.items()},
            "draws": self._draws.get_state(),
            "numbers": self._numbers.cpu().clone(),
        }

    def load_state_dict(self, saved: Mapping[str, Any], device: torch.device) -> None:
        """Continue from a saved state.

        Args:
            saved: Result of `state_dict`.
            device: Where images are edited.
        """
        acts = "augment" in self._config.action
        samples = {i: Sample(**sample) for i, sample in saved["samples"].items() if acts}
        for i, effect in self._effects.items():
            if i in samples and effect.sample.is_same(samples[i]):
                samples[i] = effect.sample
        self._take(samples, device)
        self._draws.set_state(saved["draws"])
        if len(self._numbers) == len(saved["numbers"]):
            self._numbers.copy_(saved["numbers"])


def _misfit(images: Tensor, shape: torch.Size) -> str:
    return (
        f"augment cannot act: the model is called with images {tuple(images.shape[1:])} of "
        f"{images.dtype}, the probe has {tuple(shape)} of floating numbers; give both the same "
        "size and normalisation, or leave augment out of the actions"
    )
