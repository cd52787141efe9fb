"""What is told to the user in one line instead of a traceback."""

import re


class UserError(Exception):
    """Something that the user can put right: the text names the file or option, what is wrong, and what to do."""

    def __str__(self) -> str:
        # torch re-raises what happens in a loading process with that process's traceback as the text; its last line
        # is "module.Class: text".
        text = super().__str__()
        if text.startswith("Caught "):
            text = text.strip().splitlines()[-1].partition(": ")[2]
        return text


class ImageError(UserError):
    """A file that can't be read as one X-ray image."""


def reason(error: Exception) -> str:
    """Why a file could not be written or read, as the operating system words it ("No space left on device")."""
    text = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    if "inline_container" in text:  # torch.save, which does not say why
        return "a file could not be written to its end"
    told = re.search(r"I/O error: (.*) \(os error \d+\)", text)  # as safetensors words it
    return told[1] if told else text
