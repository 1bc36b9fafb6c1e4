"""Decodes a large image in another process: `python -m serving.protocol.decode_process FORMAT < FILE > PIXELS`.

PIL holds the interpreter lock while it allocates and frees memory and while it decodes WebP: up to 100 ms at a time for
24 megapixels. No other thread of the process runs during this time, including the event loop.
"""

import errno
import os
import shutil
import struct
import subprocess
import sys
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from PIL import Image

from realcustom.reference_image import ReferenceImage

from .errors import is_system_error

PROJECT_ROOT = Path(__file__).resolve().parents[2]
HEADER = struct.Struct("<II")  # height, width; then the RGB pixels
CHUNK_BYTES = 2**18
DAMAGED = 65  # exit code for a file that is damaged (EX_DATAERR)


def decode_in_process(file: BinaryIO, image_format: str) -> ReferenceImage:
    """Decode and normalize an image file. Blocks for up to seconds, so call it in a thread.

    Args:
        file: read from its current position to its end.
        image_format: PIL's name of the format, for example "PNG".
    Raises:
        ValueError: the file is damaged; the message is that of PIL.
        ChildProcessError: the process ended for another reason, for example because memory was exhausted.
        OSError: the process could not be started.
    """
    with subprocess.Popen(
        [sys.executable, "-m", __name__, image_format],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # the modules of this process
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        with suppress(BrokenPipeError):  # the process has ended; its error follows
            shutil.copyfileobj(file, process.stdin, CHUNK_BYTES)
            process.stdin.close()
        pixels = _read_pixels(process.stdout)
        error = process.stderr.read().decode(errors="replace").strip()
    if pixels is None:
        reason = error.splitlines()[-1] if error else "no message"
        if process.returncode == DAMAGED:
            raise ValueError(reason)
        raise ChildProcessError(errno.ECHILD, f"the decoder ended with code {process.returncode}: {reason}")
    return ReferenceImage(pixels)


def _read_pixels(stream: IO[bytes]) -> np.ndarray | None:
    """The pixels, uint8 [height, width, 3]; None if the stream ends before them."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    pixels = np.empty((*HEADER.unpack(header), 3), dtype=np.uint8)
    buffer = pixels.data.cast("B")
    position = 0
    while position < len(buffer):
        count = stream.readinto(buffer[position : position + CHUNK_BYTES])  # type: ignore[attr-defined]
        if not count:
            return None
        position += count
    pixels.flags.writeable = False
    return pixels


def main() -> None:
    try:
        image = Image.open(BytesIO(sys.stdin.buffer.read()), formats=sys.argv[1:])
        image.load()
        reference = ReferenceImage.from_pil(image)
    except Exception as error:  # PIL's decoders raise many types on damaged files
        if is_system_error(error):
            raise
        print(error, file=sys.stderr)
        sys.exit(DAMAGED)
    height, width, _ = reference.pixels.shape
    sys.stdout.buffer.write(HEADER.pack(height, width))
    sys.stdout.buffer.write(reference.pixels.data)


if __name__ == "__main__":
    main()
