"""Decodes uploaded files in a process of its own, which is ended if a file takes too long.

The parent sends a line of JSON and the file; the child answers with a line of JSON and the pixels:

    {"bytes": 12345, "size": 224, "side": 640, "window": [40, 400]}
    {"sizes": [[224, 224], [640, 512]], "window": {"centre": 40, ...}}     or {"error": "broken image (...)"}

Nothing that the child sends is unpickled or run.
"""

import io
import json
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from threading import Lock, Timer
from typing import BinaryIO

import numpy as np
from PIL import Image

from xray_fastai.data.dicom.grey import Window
from xray_fastai.data.dicom.reader import has_mark, open_dicom
from xray_fastai.data.images import FORMATS, MAX_PIXELS, open_image
from xray_fastai.system.errors import ImageError

SECONDS = 20
"""Time for one file. A JPEG 2000 of 20 million pixels, the slowest of usual files, takes 4 s on a slow core."""
REFUSED = ("GIF", "JPEG2000", "PPM")
"""Formats of `images.FORMATS` that the page does not ask for; 40 MB of PPM's text took 16 s."""


@dataclass(frozen=True)
class Wanted:
    """Holds what to decode a file for."""

    size: int  # side in pixels of the square that the network takes
    side: int | None = None  # of the picture to show; None: no picture
    window: tuple[float, float] | None = None  # centre and width for a DICOM file; None: as the file says


@dataclass(frozen=True)
class Decoded:
    """Holds a decoded file."""

    pixels: np.ndarray  # (size, size), 8-bit, as `open_image(content, size)` gives them
    picture: Image.Image | None  # the image as it was read, scaled down to at most `side` pixels
    window: Window | None  # of a grey DICOM file


class Decoder:
    """Decodes one file at a time in a child process, which starts with the first file and after one was ended."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = Lock()

    def start(self) -> None:
        """Start the process, so that the first file needs not wait for it."""
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-m", "xray_fastai.serving.decoding"]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )

    def decode(self, content: bytes, wanted: Wanted) -> Decoded:
        """Decode a file.

        Raises:
            ImageError: the file cannot be read, has no such window, or takes more than `SECONDS`.
        """
        with self.lock:
            self.start()
            assert self.process is not None
            process, expired = self.process, False

            def end() -> None:
                nonlocal expired
                expired = True
                process.kill()

            timer = Timer(SECONDS, end)
            timer.start()
            try:
                return _ask(process, content, wanted)
            except (OSError, ValueError):
                self.close()
                reason = f"takes more than {SECONDS} s to decode" if expired else "needs too much memory to decode"
                raise ImageError(f"{reason}; save it as a plain JPEG or a PNG", value="image") from None
            finally:
                timer.cancel()

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            with suppress(OSError):  # what the process has not read
                self.process.communicate()


def _ask(process: subprocess.Popen[bytes], content: bytes, wanted: Wanted) -> Decoded:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps({"bytes": len(content)} | asdict(wanted)).encode() + b"\n")
    process.stdin.write(content)
    process.stdin.flush()
    answer = json.loads(process.stdout.readline())
    if "error" in answer:
        raise ImageError(answer["error"], value="image")
    pixels, *picture = [_read(process.stdout, width, height) for width, height in answer["sizes"]]
    window = None if answer["window"] is None else Window(**answer["window"])
    return Decoded(np.asarray(pixels), picture[0] if picture else None, window)


def _read(stream: BinaryIO, width: int, height: int) -> Image.Image:
    """Read a picture's pixels; fewer than that are a ValueError."""
    return Image.frombytes("L", (width, height), stream.read(width * height))


def _decoded(content: bytes, wanted: Wanted) -> tuple[list[Image.Image], Window | None]:
    """Return the image as a square of `size` pixels, and, unless `side` is None, one of at most `side` pixels.

    Raises:
        ImageError: as `open_image`; the format is one of `REFUSED`; or a window is wanted that the file cannot have.
    """
    source: bytes | Image.Image = content
    window = None
    if has_mark(content):
        source = open_dicom(content, MAX_PIXELS, wanted.window)  # decoded once for both pictures
        window = source.info["window"]
    else:
        if wanted.window is not None:
            raise ImageError("not a DICOM file, so it has no window; leave it out", value="image")
        kind = None
        with suppress(Exception), Image.open(io.BytesIO(content), formats=FORMATS) as image:
            kind = image.format
        if kind in REFUSED:
            raise ImageError(f"{kind}; send a JPEG, PNG, TIFF, BMP, WebP or DICOM file", value="image")
    pictures = [open_image(source, wanted.size)]
    if wanted.side is not None:
        pictures.append(open_image(source))
        pictures[1].thumbnail((wanted.side, wanted.side))
    return pictures, window


def main() -> None:
    """Answer the parent until it closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent ends this process
    while line := sys.stdin.buffer.readline():
        head = json.loads(line)
        content = sys.stdin.buffer.read(head.pop("bytes"))
        try:
            pictures, window = _decoded(content, Wanted(**head))
            shown = None if window is None else asdict(window)
            answer = {"sizes": [picture.size for picture in pictures], "window": shown}
        except ImageError as error:
            pictures, answer = [], {"error": error.message}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        for picture in pictures:
            sys.stdout.buffer.write(picture.tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
