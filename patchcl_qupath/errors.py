"""What can go wrong, as exceptions. Every message names what to do next.

PatchCLError
├── ConfigError       a setting is unknown or out of range
├── ProjectError      the project as a whole cannot be used
├── ImageError        one image cannot be used; the others go on
│   └── SlideError    its pixels cannot be opened or read
│       └── DamagedError    they cannot be decoded, or not as RGB
├── ModelError        a model is missing, damaged or of another kind
├── TrainingError     nothing can be learnt from the images given
├── GroundTruthError  the ground truth is missing, damaged or of another image
└── StorageError      results cannot be written here
"""

import re
from pathlib import PureWindowsPath


class PatchCLError(Exception):
    """The root: whatever the package raises for the user to read."""


class ConfigError(PatchCLError):
    """A setting is unknown or out of range."""


class ProjectError(PatchCLError):
    """The project as a whole cannot be used."""


class ImageError(PatchCLError):
    """One image cannot be used; the others go on."""


class SlideError(ImageError):
    """The pixels of an image cannot be opened or read."""


class DamagedError(SlideError):
    """Pixels cannot be decoded, or not as RGB; others of the same image may well be.

    ``reason`` is what the decoder reported.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class ModelError(PatchCLError):
    """A model is missing, damaged or of another kind."""


class TrainingError(PatchCLError):
    """Nothing can be learnt from the images given, or not with these settings."""


class GroundTruthError(PatchCLError):
    """The ground truth is missing, damaged or of another image."""


class StorageError(PatchCLError):
    """Results cannot be written here."""


_PLAIN = re.compile(r"[\w@%+=:,./~-]+")  # of a path that no shell takes for more
_LONGEST = 400  # characters of another program's error: some list all that can be meant

FORESEEN = (PatchCLError, MemoryError, PermissionError)  # any other is an error of this program


def is_damage(error: Exception) -> bool:
    """Whether an error in reading a file is of its content: another read would raise it again.

    Errors of the disk and the network have a number. Those of decoders have none, also where they
    are OSErrors, as of gzip, bz2, Pillow and Arrow.
    """
    if isinstance(error, OSError):
        return error.errno is None
    return not isinstance(error, MemoryError)


def reason_of(error: Exception) -> str:
    """What to tell a person of an error; one that is not ours is an error of this program."""
    if isinstance(error, PatchCLError):
        return str(error)
    if isinstance(error, MemoryError):
        return too_little_memory("go on", error)
    if isinstance(error, PermissionError) and error.filename:
        # Such as a folder that its owner alone may look into: writers raise StorageError.
        return f"{error.filename} may not be read from here: ask for the permission"
    return f"{type(error).__name__}: {error} (an internal error)"


def too_little_memory(task: str, error: MemoryError) -> str:
    """What to tell a person of a ``task`` for which there was no memory."""
    reason = f" ({error})" if str(error) else ""
    return f"too little memory to {task}{reason}: close other programs, or use fewer --workers"


def quoted(path: object) -> str:
    """A path as a command in a message has it: in double quotes where a shell would part it.

    On Windows with slashes, which all of its shells take: Git Bash drops backslashes.
    """
    text = path.as_posix() if isinstance(path, PureWindowsPath) else str(path)
    return text if _PLAIN.fullmatch(text) else f'"{text}"'


def count_of(number: int, one: str, several: str = "") -> str:
    """A number and the noun that it counts: 1 image, 2,000 images."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def one_line(error: BaseException) -> str:
    """The text of another program's error, or of the one that caused it, for a message of ours."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:_LONGEST]
