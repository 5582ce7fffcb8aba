"""The processes of a distributed run: what they tell each other, and that none is left waiting.

Nothing here knows what is told. A run of one process sends nothing.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, distributed, nn

from concept_guard.errors import ConfigError, ProbeError
from concept_guard.sharding import unsharded

T = TypeVar("T")
TIMES = ("seconds", "overhead")  # differ between processes by nature


class PeerError(RuntimeError):
    """Another process of the run has failed; what was under way is undone in all of them."""


class Holder(Protocol):
    """What holds a state that all processes share."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def put_back(self, saved: dict[str, Any]) -> None:
        """Take a state that was there before, or that another process has."""


def processes() -> int:
    """Return how many processes torch.distributed knows; 1 before it is initialized."""
    there = distributed.is_available() and distributed.is_initialized()
    return int(distributed.get_world_size()) if there else 1


class Ranks:
    """What the guards of several processes tell each other, in a group of their own.

    Every process runs the same work on the same numbers, so that what is decided needs no telling:
    the forward passes over the probe are shared out and their rows gathered, and afterwards all
    compare what they hold. The group talks over gloo, whatever the training does, so that a guard
    never waits in the queue of a training step.

    Args:
        alone: Take no notice of other processes. Otherwise the group is made here, for which all
            processes have to come here.

    Attributes:
        rank: Of this process.
        size: How many processes there are.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self.rank, self.size, self._alone = 0, 1, alone
        self._group: Any = None
        if not alone and processes() > 1:
            self.rank, self.size = int(distributed.get_rank()), processes()
            self._group = distributed.new_group(backend="gloo")

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes logs and hears people."""
        return self.rank == 0

    def gathered(self, said: T) -> list[T]:
        """Return what every process said, in the order of their ranks.

        A `PeerError` says that another process failed instead of coming here.

        Args:
            said: By this process; anything that can be pickled, tensors on the CPU.

        Returns:
            One entry per process.
        """
        return [said] if self._group is None else self._exchanged((said, ""))

    def of_first(self, said: T) -> T:
        """Return what the first process said, in all of them; see `gathered`."""
        heard: list[T] = self.gathered(said)
        return heard[0]

    def check(self) -> None:
        """Refuse to go on alone where others have come.

        Raises:
            ConfigError: If torch.distributed was initialized since the guard was built.
        """
        if self._group is None and not self._alone and processes() > 1:
            raise ConfigError(
                f"the guard was built before torch.distributed knew of {processes()} processes: "
                "each would correct something else; build ConceptGuard after "
                "torch.distributed.init_process_group, in every process"
            )

    def check_alike(self, labels: list[Tensor]) -> None:
        """Refuse a probe of which every process has another part.

        Args:
            labels: Of all images of the probe, batch by batch, as this process has them.

        Raises:
            ProbeError: If they are not the same everywhere.
        """
        heard = self.gathered((digest([y.long() for y in labels]), sum(map(len, labels))))
        if len(set(heard)) > 1:
            raise ProbeError(
                f"the {self.size} processes have different probes, of "
                f"{', '.join(str(count) for _, count in heard)} images; expected the whole probe "
                "in every process, which the guards share out themselves: build its loader "
                "without a distributed sampler, and do not prepare or shard it"
            )

    def joined(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, one after another, on the device of these.

        Args:
            rows: `(B, ...)` of this process, where B may differ.

        Returns:
            `(sum of B, ...)` rows without gradient.
        """
        if self._group is None:
            return rows
        return torch.cat(self.gathered(rows.detach().cpu())).to(rows.device)

    def summed(self, counts: Tensor) -> Tensor:
        """Return the sum of a tensor of the CPU over all processes."""
        if self._group is not None:
            counts = counts.clone()
            distributed.all_reduce(counts, group=self._group)
        return counts

    def fail(self, error: Exception) -> None:
        """Meet the others, wherever they wait, with the news that this process has failed.

        Args:
            error: Why.
        """
        if self._group is not None:
            with suppress(RuntimeError, ConfigError):  # they know, or are gone
                self._exchanged((None, f"process {self.rank}: {type(error).__name__}: {error}"))

    def _exchanged(self, message: tuple[Any, str]) -> list[Any]:
        if processes() < self.size:
            raise ConfigError(
                "the processes do not know each other any more; call guard.bake() and "
                "guard.close() before torch.distributed.destroy_process_group()"
            )
        heard: list[Any] = [None] * self.size
        distributed.all_gather_object(heard, message, group=self._group)
        failures = [failure for _, failure in heard if failure]
        if failures:
            raise PeerError("; ".join(failures))
        return [said for said, _ in heard]

    def all_or_none(self, stage: Callable[[], T], holder: Holder, model: nn.Module) -> T:
        """Run a stage in all processes; if it fails in one, all are as they were.

        Afterwards all hold the same: where machines round differently, what the first holds. A
        `PeerError` says that the stage failed in another process.

        Args:
            stage: Changes the holder's state.
            holder: Of the state.
            model: Whose buffers are those of the first process meanwhile, as
                DistributedDataParallel would have them in the next forward pass.

        Returns:
            What the stage returns in this process.
        """
        if self._group is None:
            return stage()
        before = holder.state_dict()
        try:
            with unsharded(model), self._one_model(model):
                result = stage()
            state = holder.state_dict()
            if len(set(self.gathered(digest(state)))) > 1:
                holder.put_back(self.of_first(state))
        except Exception as error:
            if not isinstance(error, PeerError):
                self.fail(error)
            holder.put_back(before)
            raise
        return result

    @contextmanager
    def _one_model(self, model: nn.Module) -> Iterator[None]:
        """Have the buffers of the first process in all of them for the block.

        Yields:
            Nothing.

        Raises:
            ValueError: If the processes train different models.
        """
        buffers = [b for b in model.buffers() if isinstance(b, Tensor)]
        own = [b.detach().cpu().clone() for b in buffers]
        last = [p.detach() for p in model.parameters()][-2:]
        said = self.gathered((digest(last), own if self.first else []))
        if len({weights for weights, _ in said}) > 1:
            raise ValueError(
                f"the {self.size} processes train models with different weights, expected replicas "
                "of one; wrap the model in DistributedDataParallel before the first update"
            )
        try:
            _fill(buffers, said[0][1])
            yield
        finally:
            _fill(buffers, own)

    @contextmanager
    def one_result(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Let the block change tensors of the model: to the same values everywhere, or not at all.

        Args:
            tensors: Changed in place, if at all.

        Yields:
            Nothing.
        """
        if self._group is None:
            yield
            return
        changed = list(tensors)
        before = [t.detach().cpu().clone() for t in changed]
        try:
            yield
            _fill(changed, self.of_first([t.detach().cpu() for t in changed]))
        except Exception:
            _fill(changed, before)
            raise

    def close(self) -> None:
        """Tell nothing from now on, and give the group back."""
        if self._group is not None and processes() > 1:
            distributed.destroy_process_group(self._group)
        self._group, self.rank, self.size, self._alone = None, 0, 1, True


ALONE = Ranks(alone=True)


def _fill(buffers: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)


def digest(state: object) -> str:
    """Return a hash of plain data and tensors that is the same in every process.

    Args:
        state: As `state_dict` returns it; how long something took does not count.

    Returns:
        Hexadecimal digits.
    """
    return sha256("".join(_parts(state)).encode()).hexdigest()


def _parts(value: object) -> Iterator[str]:
    if isinstance(value, Tensor):
        numbers = value.detach().cpu().clone().flatten()  # of its own: numpy pins memory down
        yield f"{value.dtype} {tuple(value.shape)} "
        yield sha256(numbers.view(torch.uint8).numpy().tobytes()).hexdigest()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in TIMES:
                yield f"{key!r}: "
                yield from _parts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _parts(inner)
            yield ", "
    else:
        yield repr(value)
