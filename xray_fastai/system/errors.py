"""Errors that the user reads as one line instead of a traceback."""

import re

from xray_fastai.system.text import as_typed


class UserError(Exception):
    """An error that the user can fix: the message names the file or option, what is wrong, and what to do.

    The message names other options as Python does (`size=`, `cache=False`). In Python `str(error)` is "threshold 1.5:
    give a probability"; on the command line it is "--threshold 1.5: give a probability" (`on_command_line`).
    """

    def __init__(
        self,
        message: str,  # what is wrong, and what to do
        *,
        option: str | None = None,  # Python's name of the option that is wrong
        value: object = None,  # the option's value; None leaves it out
    ):
        super().__init__(message)
        self.option, self.value = option, value

    def __str__(self) -> str:
        return self._text(self.option, self.message)

    def on_command_line(self, options: dict[str, str]) -> str:
        """Return the message with the option as the user types it.

        Args:
            options: the command's options as the user types them, by Python's names; an option that is not among them
                (a positional argument) is not named.
        """
        return self._text(options.get(self.option or ""), as_typed(self.message, options))

    @property
    def message(self) -> str:
        """The message without the option and its value."""
        text = super().__str__()
        # torch re-raises an error of a loading process with that process's traceback as the message; its last line is
        # "module.Class: message"
        return text.strip().splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else text

    def _text(self, option: str | None, message: str) -> str:
        head = " ".join(str(part) for part in (option, self.value) if part is not None)
        return f"{head}: {message}" if head else message


class OptionError(UserError):
    """A value, or options together, that are wrong whatever the files hold: on the command line the exit code is 2."""


INCOMPLETE = ("inline_container", "basic_ios::clear")  # torch.save, which does not say why
WRITE_ERRORS = ("I/O error", "IoError(Os ", "Parent directory", "cannot be opened", *INCOMPLETE)
"""What safetensors and `torch.save` say; the first two (new and before 0.6) are SafetensorErrors, the others plain
RuntimeErrors."""


class ImageError(UserError):
    """A file that cannot be read as one X-ray image; `value` is its path, or "image" for an image without a path."""


def is_write_error(error: BaseException) -> bool:
    """Return whether an error says that a file could not be written: one of the operating system, of safetensors, or
    of torch's writer of zip files. Any other error while files are written is a bug."""
    return isinstance(error, OSError) or any(text in str(error) for text in WRITE_ERRORS)


def reason(error: Exception) -> str:
    """Return why a file could not be written or read, as the operating system words it ("No space left on device")."""
    text = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    if any(part in text for part in INCOMPLETE):
        return "a file could not be written completely"
    match = re.search(r'I/O error: (.*) \(os error \d+\)|IoError\(Os .*message: "(.*)" \}\)', text)  # of safetensors
    return match[1] or match[2] if match else text
