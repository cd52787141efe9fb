"""What is told to the user in one line instead of a traceback."""


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
