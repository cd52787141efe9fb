"""Decodes uploaded files in a process of its own, which is ended if a file takes too long.

The parent sends a line of JSON and the file; the child answers with a line of JSON and the pixels:

    {"bytes": 12345, "size": 224, "side": 640}
    {"sizes": [[224, 224], [640, 512]]}          or {"error": "broken image (...)"}

Nothing that the child sends is unpickled or run.
"""

import io
import json
import signal
import subprocess
import sys
from contextlib import suppress
from threading import Lock, Timer
from typing import BinaryIO

import numpy as np
from PIL import Image

from xray_fastai.data.dicom.reader import has_mark
from xray_fastai.data.images import FORMATS, open_image
from xray_fastai.system.errors import ImageError

SECONDS = 20
"""Time for one file. A JPEG 2000 of 20 million pixels, the slowest of usual files, takes 4 s on a slow core."""
REFUSED = ("GIF", "JPEG2000", "PPM")
"""Formats of `images.FORMATS` that the page does not ask for; 40 MB of PPM's text took 16 s."""


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

    def decode(self, content: bytes, size: int, side: int | None = None) -> tuple[np.ndarray, Image.Image | None]:
        """Decode a file.

        Args:
            content: the file's bytes.
            size: side in pixels of the square that the network takes.
            side: of the picture to show; None: no picture.

        Returns:
            The grey values (size, size) as `open_image(content, size)` gives them, and the image as it was read, scaled
            down to at most `side` pixels.

        Raises:
            ImageError: the file cannot be read, or takes more than `SECONDS`.
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
                return _ask(process, content, size, side)
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


def _ask(
    process: subprocess.Popen[bytes], content: bytes, size: int, side: int | None
) -> tuple[np.ndarray, Image.Image | None]:
    assert process.stdin is not None and process.stdout is not None
    head = {"bytes": len(content), "size": size, "side": side}
    process.stdin.write(json.dumps(head).encode() + b"\n")
    process.stdin.write(content)
    process.stdin.flush()
    answer = json.loads(process.stdout.readline())
    if "error" in answer:
        raise ImageError(answer["error"], value="image")
    pixels, *picture = [_read(process.stdout, width, height) for width, height in answer["sizes"]]
    return np.asarray(pixels), picture[0] if picture else None


def _read(stream: BinaryIO, width: int, height: int) -> Image.Image:
    """Read a picture's pixels; fewer than that are a ValueError."""
    return Image.frombytes("L", (width, height), stream.read(width * height))


def _decoded(content: bytes, size: int, side: int | None) -> list[Image.Image]:
    """Return the image as a square of `size` pixels, and, unless `side` is None, one of at most `side` pixels.

    Raises:
        ImageError: as `open_image`; or the format is one of `REFUSED`.
    """
    if not has_mark(content):
        kind = None
        with suppress(Exception), Image.open(io.BytesIO(content), formats=FORMATS) as image:
            kind = image.format
        if kind in REFUSED:
            raise ImageError(f"{kind}; send a JPEG, PNG, TIFF, BMP, WebP or DICOM file", value="image")
    pictures = [open_image(content, size)]
    if side is not None:
        pictures.append(open_image(content))
        pictures[1].thumbnail((side, side))
    return pictures


def main() -> None:
    """Answer the parent until it closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent ends this process
    while line := sys.stdin.buffer.readline():
        head = json.loads(line)
        content = sys.stdin.buffer.read(head["bytes"])
        try:
            pictures = _decoded(content, head["size"], head["side"])
            answer = {"sizes": [picture.size for picture in pictures]}
        except ImageError as error:
            pictures, answer = [], {"error": error.message}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        for picture in pictures:
            sys.stdout.buffer.write(picture.tobytes())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
