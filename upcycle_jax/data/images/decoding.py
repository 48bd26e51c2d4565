"""PNG and JPEG files as images, by Pillow. They are not trusted: their size is looked at before
anything is decoded.
"""

import io
import pathlib
from typing import Any

SUFFIXES = (".png", ".jpg", ".jpeg")
_FORMATS = ("PNG", "JPEG")
_LARGEST_FILE = 1 << 28
_MOST_PIXELS = 1 << 27
"""Of a file and of an image: far above photographs, and what a machine decodes without trouble."""
_GREY = ("1", "L", "LA")
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def decode(encoded: bytes, *, what: object, channels: int | None, at_least: int) -> Any:
    """An image of mode 'L' (1 channel) or 'RGB' (3); transparency is left out.

    Args:
      encoded: a PNG or JPEG file.
      what: its name, for messages.
      channels: 1 or 3; None for 1 where the file is grey, and 3 where it has colours.
      at_least: a JPEG's shorter side may be halved while it is decoded, but not below this.

    Raises:
      ValueError: it is none, damaged, too large, or not of 8 bits.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > _MOST_PIXELS:
                raise ValueError(f"it has {width} x {height} pixels, too many to be read")
            if image.mode not in _EIGHT_BITS:
                raise ValueError(f"its values are of mode {image.mode}: images of 8 bits are read")
            is_grey = channels == 1 or (channels is None and image.mode in _GREY)
            mode = "L" if is_grey else "RGB"
            image.draft(mode, (at_least, at_least))
            return image.convert(mode)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"the image {what} cannot be read ({error}): mend it or take it out"
        ) from None


def shrunk(image: Any, shorter_side: int) -> Any:
    """A Pillow image of mode 'L' or 'RGB' whose shorter side has at most so many pixels: scaled
    bilinearly, the mean over the pixels that each new one covers; as it is where it has no more.
    """
    from PIL import Image

    has = min(image.size)
    if has <= shorter_side:
        return image
    width, height = (round(side * shorter_side / has) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def read_file(path: pathlib.Path) -> bytes:
    """The bytes of an image's file.

    Raises:
      ValueError: it cannot be read, or is too large.
    """
    try:
        size = path.stat().st_size
        if size > _LARGEST_FILE:
            raise ValueError(f"it has {size:,} bytes")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the image {path} cannot be read ({error}): mend it or take it out"
        ) from None
