"""Exceptions raised on purpose; each names the offender, what was expected and the way out.

Nothing here knows what went wrong: the stages write the messages.
"""


class ConceptGuardError(Exception):
    """Base class: catch this to catch everything the library raises on purpose."""


class ConfigError(ConceptGuardError, ValueError):
    """A configuration or recipe asks for something unknown or impossible."""


class TapError(ConceptGuardError, ValueError):
    """The place to read does not exist, has no usable layout, or never fires."""


class ProbeError(ConceptGuardError, ValueError):
    """The probe set cannot be used: empty, mislabelled, or missing a class."""


class StateError(ConceptGuardError, ValueError):
    """A saved state belongs to another schema, model or run."""


class BakeError(ConceptGuardError, RuntimeError):
    """The correction cannot be folded into the model's own weights exactly."""
