"""The errors that a user can fix.

Each message is one line: what was found, where, and what to do. `cli.main` prints it without a
traceback and exits with `exit_code`. Anything else that escapes is a bug and keeps its traceback.
"""


class MoetoolError(Exception):
    """Base of all errors that the user can fix; never raised itself."""

    exit_code = 1


class CheckpointError(MoetoolError):
    """A model folder is missing, damaged, unsupported or cannot be written."""


class ConfigError(MoetoolError):
    """Options, a recipe or a configuration file contradict each other or the model."""


class DataError(MoetoolError):
    """Text, tokens or a tokenizer cannot be read as what they claim to be."""


class EvaluationError(MoetoolError):
    """A task is unknown, its data is missing, or it failed."""


class CheckFailed(MoetoolError):
    """A `--fail-if` condition holds."""

    exit_code = 3


# Parts of the messages with which torch, oneDNN, numpy, Python's threads and the library loader run out of memory.
_NO_MEMORY = (
    "can't allocate memory", "out of memory", "Unable to allocate", "annot allocate memory", "can't start new thread",
    "could not create a primitive", "failed to map segment",
)  # fmt: skip


def in_one_line(error: BaseException, limit: int = 200) -> str:
    """An error's message without its line breaks, cut to so many characters; its type where it says nothing."""
    return (" ".join(str(error).split()) or type(error).__name__)[:limit]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library says that there is no memory left."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY)
