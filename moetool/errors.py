"""The errors a user can mend.

Each message is one line: what was found, where, and what to do. `cli.main` prints it without a
traceback and exits with `exit_code`. Anything else that escapes is a bug and keeps its traceback.
"""


class MoetoolError(Exception):
    """Base of all errors that the user can mend; never raised itself."""

    exit_code = 1


class CheckpointError(MoetoolError):
    """A model folder is missing, damaged, unsupported or cannot be written."""


class ConfigError(MoetoolError):
    """Options, a recipe or a configuration file contradict each other or the model."""


class DataError(MoetoolError):
    """Text, tokens or a tokenizer cannot be read as what they claim to be."""


class EvaluationError(MoetoolError):
    """A task is unknown, has no data at hand, or failed."""


class CheckFailed(MoetoolError):
    """A `--fail-if` condition holds."""

    exit_code = 3


# How torch, oneDNN, numpy, Python's threads and the loader of libraries say that there is no memory left.
_NO_MEMORY = (
    "can't allocate memory", "out of memory", "Unable to allocate", "annot allocate memory", "can't start new thread",
    "could not create a primitive", "failed to map segment",
)  # fmt: skip


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library says that there is no memory left."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY)
