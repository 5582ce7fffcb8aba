"""Whether the guarded model is the one that is trained, in a right loop, with finite numbers.

Nothing here knows what is done with the numbers.
"""

import warnings

from torch import Tensor

from concept_guard import measures
from concept_guard.errors import TapError
from concept_guard.ranks import Ranks
from concept_guard.reading import Reading
from concept_guard.taps import Tap
from concept_guard.wiring import Wiring


class Health:
    """Watches a tap while its model trains; what is no reason to stop is a warning.

    Args:
        tap: Where the model is read.
        name: The tap's name in the settings, for messages.
        ranks: The processes that train.
    """

    def __init__(self, tap: Tap, name: str, ranks: Ranks) -> None:
        self._tap, self._name, self._ranks = tap, name, ranks
        self._fired = False
        self._loss: Tensor | None = None
        self._warned: set[str] = set()
        self._wiring = Wiring(tap)

    def check_step(self) -> None:
        """Expect that the tap has fired since the last call; warn once of what else is wrong.

        Raises:
            TapError: If it has not fired before the first call.
        """
        place = f"tap {self._name!r} ({self._tap.path})"
        if not self._fired and not self._tap.fired:
            raise TapError(
                f"{place} has not fired before the first guard.step(); expected the guarded model "
                "itself to be called in training. Build the guard before torch.compile and EMA "
                "copies, and call the model, not parts of it; if a network like it was compiled "
                "before in this process, call torch._dynamo.reset() and compile again"
            )
        if not self._tap.fired:
            self.warn_once(
                f"{place} has stopped firing: nothing is corrected. Was a part of the model "
                "replaced, or another model trained? Close the guard and build a new one."
            )
        self._fired = True
        self._tap.reset_fired()
        self._tap.forget()
        self.warn_once(self._wiring.updated())

    def heard(self, loss: Tensor) -> None:
        """Remember the last training loss.

        Args:
            loss: A scalar or one per sample.
        """
        self._loss = loss.detach()
        self.warn_once(self._wiring.heard(loss))

    def close(self) -> None:
        """Let go of the model."""
        self._wiring.close()

    def finite(self, reading: Reading, step: int) -> bool:
        """Return whether a reading, and the last loss, can be worked with; else warn.

        Args:
            reading: Of the probe.
            step: Optimizer updates so far, for the message.

        Returns:
            False if there are NaN or infinite values.
        """
        heard = self._ranks.gathered(measures.not_finite(reading, self._loss, self._name))
        wrong = [*dict.fromkeys(what for of_one in heard for what in of_one)]
        if wrong:
            warnings.warn(
                f"round at step {step} skipped: {' and '.join(wrong)} hold NaN or infinite values, "
                "expected finite ones; lower the learning rate or check the data. The guard keeps "
                "its last state and training goes on.",
                stacklevel=5,
            )
        return not wrong

    def warn_once(self, message: str) -> None:
        """Warn, but not a second time in the same words.

        Args:
            message: What is wrong, and the way out; nothing is said if it is empty.
        """
        if message and message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=4)
