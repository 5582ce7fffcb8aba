"""Doctor: what the guard costs, measured with the parts that do the work in a training.

Nothing here decides what is too much.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from concept_guard.clock import spacing
from concept_guard.config import GuardConfig
from concept_guard.corrector import Corrector
from concept_guard.counterfactual import mapped
from concept_guard.examination.report import Cost, Ratio
from concept_guard.examination.settings import Loop, in_updates
from concept_guard.examination.switches import autocast
from concept_guard.health import Health
from concept_guard.influence import Tail
from concept_guard.probe import probe_batches
from concept_guard.reading import Reading
from concept_guard.rebalancing import descended
from concept_guard.rounds import Findings, look
from concept_guard.sampling import Samples
from concept_guard.taps import Edit, Tap

PROBE_IMAGES = 4096  # where nobody says how many there are
LEAST, MOST = 5, 31  # turns
SHORTEST = 0.1  # seconds of updates that make a turn
MADE_UP = 1024  # rows on which a round is measured
FEWEST = 128  # images that they are of, at least
CLASSES = 8  # of them


@dataclass(frozen=True, eq=False)
class Bench:
    """A guarded and a plain copy of a model, side by side.

    Attributes:
        tap: Of the guarded one.
        plain: The other.
        images: `(N, ...)` the sample, where the models are.
        labels: `(N,)` its classes.
        settings: Of the guard.
        loop: Around it.
    """

    tap: Tap
    plain: nn.Module
    images: Tensor
    labels: Tensor
    settings: GuardConfig
    loop: Loop

    def measured(self, seconds: float) -> Cost:
        """Return what the guard costs.

        Args:
            seconds: How long measuring updates may take, as far as five turns allow.

        Returns:
            Ratios with their spread, and what they come to at the schedule.
        """
        wanted = self.loop.probe_images or PROBE_IMAGES
        per_image = self._seconds(self._read) / len(self.images)
        positions = self.tap.grid[0] * self.tap.grid[1]
        size = min(wanted, max(FEWEST, MADE_UP // positions))
        world = made_up(self.tap, size, positions)
        scale = min(wanted, max(1, self.settings.max_rows // positions)) / size
        rounds, found = [], None
        for seed in range(2):  # the first round starts from nothing, later ones from the last
            began = time.perf_counter()
            found = world.look(self.settings, seed, found)
            self._wait()
            spent = scale * (time.perf_counter() - began + world.passed() * per_image)
            rounds.append(1 + spent / (wanted * per_image))
        active = self._corrector()
        correcting = _brought_under(active, found, world.reading, self.settings)
        plain, watch, correct = self._turns(active if correcting else None, seconds)
        batch_size = self.loop.batch_size or len(self.images)
        update = statistics.median(plain) * batch_size / len(self.images)
        per_round = statistics.median(rounds) * wanted * per_image
        every, shortest = (in_updates(self.settings, n) for n in ("every", "track_every"))
        if self.settings.track_every == "auto":
            shortest = max(shortest or 1, spacing(self.settings.reference_images, batch_size))
        observing = _ratio(watch, plain)
        extra = update * max(0.0, observing.middle - 1) + per_round / (every or 1)
        corrected = share = None
        if correcting:
            corrected = _ratio(correct, plain)
            tracked = torch.cat([t.images for t in active.tracked]).unique()
            more = update * max(0.0, corrected.middle - 1) + per_round / (every or 1)
            more += len(tracked) * per_image / (shortest or 1)
            share = more / (update + more)
        return Cost(
            batch=tuple(self.images.shape),
            batch_size=batch_size,
            device=self.images.device.type,
            threads=torch.get_num_threads(),
            observing=observing,
            correcting=corrected,
            probe_images=wanted,
            pass_seconds=wanted * per_image,
            round_ratio=_quartiles(rounds),
            rows=min(wanted * positions, self.settings.max_rows),
            channels=self.tap.channels,
            observing_share=extra / (update + extra),
            correcting_share=share,
            schedule=f"a round every {every or 1} updates, tracking every {shortest or 1} at most",
        )

    def _read(self) -> None:
        batch = [(self.images, self.labels)]
        self.tap.read(batch, max_rows=self.settings.max_rows, seed=0)

    def _corrector(self) -> Corrector:
        probe = probe_batches([(self.images, self.labels)], 0)
        actions = [action for action in self.settings.action if action != "augment"]
        settings = self.settings.model_copy(update={"action": tuple(actions)})
        return Corrector(self.tap, probe, settings)  # made-up concepts do nothing to images

    @cached_property
    def _augment(self) -> Edit | None:
        """What `augment` does for one concept that shows in the whole image, the dearest kind."""
        if "augment" not in self.settings.action or not self.images.is_floating_point():
            return None
        one = torch.ones(self.images[0].numel(), dtype=torch.float64)
        tint = mapped(0 * one, 0.1 * one, 0.5 * one, one)
        if tint is None:
            return None
        there, order = tint.to(self.images.device), torch.arange(len(self.images))
        half = (order % 2 == 0).to(self.images.device)
        return partial(there.edited, act=torch.ones_like(half), wanted=half, donors=order)

    def _turns(
        self, active: Corrector | None, seconds: float
    ) -> tuple[list[float], list[float], list[float]]:
        """Return times of a plain update, one that observes and one that corrects, turn by turn."""
        correctors = [None, self._corrector(), *([] if active is None else [active])]
        kinds = [partial(self._update, corrector) for corrector in correctors]
        for kind in kinds:
            kind()  # warms up
        repeats = max(1, round(SHORTEST / max(1e-6, self._seconds(kinds[0]))))
        spent: tuple[list[float], ...] = ([], [], [])
        began = time.perf_counter()
        while len(spent[0]) < LEAST or (
            len(spent[0]) < MOST and time.perf_counter() - began < seconds
        ):
            times = [0.0] * len(kinds)
            for number in range(repeats):
                first = (len(spent[0]) + number) % len(kinds)
                for at in [*range(first, len(kinds)), *range(first)]:
                    times[at] += self._timed(kinds[at])
            for kept, passed in zip(spent, times, strict=False):
                kept.append(passed / repeats)
        return spent[0], spent[1], spent[2]

    def _update(self, corrector: Corrector | None) -> None:
        """Go forward and backward on the sample as a loop does, with a guard or without."""
        model = self.plain if corrector is None else self.tap.model
        model.zero_grad(set_to_none=True)
        if corrector is not None:
            self.tap.listening = bool(corrector.tracked)
            self.tap.augment = self._augment if corrector.tracked else None
        with autocast(self.loop, self.images):
            output = model(self.images)
            logits = output[0] if isinstance(output, tuple | list) else output
            losses = cross_entropy(logits, self.labels, reduction="none")
        loss = losses.mean()
        if corrector is not None:
            health = Health(self.tap, self.settings.tap, corrector.ranks)
            health.heard(losses)
            loss = descended(
                losses,
                self.labels,
                None,
                tap=self.tap,
                corrector=corrector,
                samples=Samples(corrector, 0),
                health=health,
            )
        loss.backward()
        if corrector is not None:
            health.check_step()
            corrector.updated()

    def _seconds(self, work: Callable[[], object]) -> float:
        """Return how long a piece of work takes once it is warm."""
        work()
        return statistics.median(self._timed(work) for _ in range(3))

    def _timed(self, work: Callable[[], object]) -> float:
        self._wait()
        began = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.images.device.type == "cuda":
            torch.cuda.synchronize(self.images.device)


@dataclass(frozen=True, eq=False)
class World:
    """Rows with a planted shortcut, so that a round has something to find and to confirm.

    Attributes:
        reading: The rows, with logits of a linear map in place of the model's.
        head: `(C, M)` that map of the mean row.
        asked: Images whose logits were asked for, call by call.
        passes: Whether the model itself must pass each of them.
    """

    reading: Reading
    head: Tensor
    asked: list[int]
    passes: bool

    def tail(self) -> Tail:
        """Return the logits of edited rows."""

        def logits(edit: Edit | None, at: Tensor | None) -> Tensor:
            rows = self.reading.rows if at is None else self.reading.rows[at]
            self.asked.append(len(rows))
            return (rows if edit is None else edit(rows)).mean(dim=1) @ self.head

        return logits

    def passed(self) -> int:
        """Return how many images the model passed on its own since the last call."""
        asked = sum(self.asked) if self.passes else 0
        self.asked.clear()
        return asked

    def look(self, settings: GuardConfig, seed: int, last: Findings | None) -> Findings:
        """Return what a round finds."""
        return look(
            self.reading,
            self.tail(),
            config=settings,
            seed=seed,
            last=None if last is None else last.pairs,
            last_ids=() if last is None else last.ids,
            next_id=0 if last is None else last.next_id,
            tracked=(),
        )


def made_up(tap: Tap, size: int, positions: int) -> World:
    """Return a world of so many images at a tap.

    Args:
        tap: Gives channels, classes and device.
        size: Images.
        positions: Rows of each.

    Returns:
        The world: up to eight classes, and a mark that goes with the first of them.
    """
    generator = torch.Generator().manual_seed(0)
    channels, num_classes = tap.channels, tap.num_classes
    classes = max(1, min(num_classes, CLASSES, channels - 1))
    axes = torch.linalg.qr(torch.randn(channels, min(channels, classes + 1), generator=generator))[
        0
    ]
    labels = torch.arange(size) % classes
    marked = torch.rand(size, generator=generator) < torch.where(labels == 0, 0.9, 0.1)
    rows = torch.randn(size, positions, channels, generator=generator) * (3.0 / channels**0.5)
    rows += 3.0 * axes.T[labels][:, None]
    rows[:, 0] += 6.0 * marked[:, None] * axes[:, -1]
    head = torch.zeros(channels, num_classes)
    head[:, :classes] = 3.0 * axes[:, :classes]
    head[:, 0] += 3.0 * positions * axes[:, -1]
    rows, labels, head = (t.to(tap.device) for t in (rows, labels, head))
    logits = rows.mean(dim=1) @ head
    indices = torch.arange(size, device=rows.device)
    reading = Reading(rows, logits, labels, indices, size, (1, positions))
    return World(reading, head, [], tap.classifier is None)


def _brought_under(
    corrector: Corrector, found: Findings | None, reading: Reading, settings: GuardConfig
) -> bool:
    """Return whether a concept is under correction now: the planted one, or any."""
    if found is None or not settings.action:
        return False
    held = [c for c in found.candidates.values() if c.flag.status == "found" and c.pair is not None]
    if held:
        corrector.add(held[:1], reading)
        return True
    for concept in sorted(found.concepts, key=lambda c: abs(c.presence_rate - 0.1)):
        try:
            corrector.erase([concept.id], found.ids, found.pairs, reading)
        except ValueError:  # its images do not tell a direction: the next one
            continue
        return True
    return False


def _ratio(guarded: list[float], plain: list[float]) -> Ratio:
    return _quartiles([g / p for g, p in zip(guarded, plain, strict=True)])


def _quartiles(values: list[float]) -> Ratio:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(statistics.median(values), low, high, len(values))
