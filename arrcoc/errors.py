"""Errors a caller can act on: each says what was given, what is allowed and what to do."""


class ArrcocError(Exception):
    """Base of every error raised on input.

    Args:
        given: what was given, as a clause without a full stop.
        allowed: what is allowed, as a clause without a full stop.
        remedy: what to do about it, as a sentence without a full stop.
    """

    def __init__(self, given: str, allowed: str, remedy: str) -> None:
        super().__init__(given, allowed, remedy)
        self.given, self.allowed, self.remedy = given, allowed, remedy

    def __str__(self) -> str:
        """The three parts as one message."""
        return f"{self.given}. Allowed: {self.allowed}. {self.remedy}."


def first_line(error: BaseException) -> str:
    """The first line of what an error says, its kind where it says nothing: for logs and `describe()`."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class ConfigError(ArrcocError):
    """A preset, a configuration file or an override is not usable."""


class ImageError(ArrcocError):
    """An image cannot be read, or is outside the configured limits."""


class QueryError(ArrcocError):
    """A question or a chat message is not usable."""


class BudgetError(ArrcocError):
    """A token budget is not a number, or lies outside what the image allows."""


class ModelError(ArrcocError):
    """A model folder or hub name cannot be loaded, or is of another architecture."""


class EngineBuildError(ArrcocError):
    """A LOD engine could not be built."""


class EngineMismatchError(ArrcocError):
    """A LOD engine does not belong to the model, the preset or the hardware at hand."""


class DecodeError(ArrcocError):
    """Text generation was asked for something it cannot do."""


class EncodingError(ArrcocError):
    """A saved encoding cannot be read or written."""
