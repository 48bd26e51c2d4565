"""Characters of the fonts that matplotlib brings: thousands of classes without a download.

A class is a character that looks like no other one before it; its images are what the eight faces
of DejaVu make of it (sans, serif and monospaced; upright, bold, oblique). The fonts lie in
matplotlib's folder of data and are free (their licence lies beside them).
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import unicodedata
import zipfile

import numpy as np

from upcycle_jax.data.images.config import GLYPH_NAMES

SIDE = 48
"""Pixels of an image."""
FACES = (
    "DejaVuSans",
    "DejaVuSerif",
    "DejaVuSansMono",
    "DejaVuSans-Bold",
    "DejaVuSerif-Bold",
    "DejaVuSansMono-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSerif-Italic",
)
DOMAINS = dict(
    zip(GLYPH_NAMES, (tuple(range(len(FACES))), (0, 3, 6), (1, 4, 7), (2, 5)), strict=True)
)
"""Names of all glyphs and of those of one design, with its faces: the same classes in another
hand.
"""
MIN_FACES = 4
HELD_OUT_EVERY = 6
"""Every so-manieth class is not trained on."""
_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Glyphs:
    """Rendered characters, class by class.

    Attributes:
      images: uint8 `[N, SIDE, SIDE]`, ink 255.
      classes: int32 `[N]`, the class of each.
      code_points: int32 `[classes]`, the character of each class.
      faces: int32 `[N]`, the place in `FACES` of each image's.
    """

    images: np.ndarray
    classes: np.ndarray
    code_points: np.ndarray
    faces: np.ndarray


@functools.cache
def load() -> Glyphs:
    """All glyphs. Rendering takes half a minute; the result is kept in the user's cache folder.

    Raises:
      ValueError: the fonts are not where matplotlib has them.
    """
    folder = _fonts()
    faces = [folder / f"{name}.ttf" for name in FACES]
    missing = [face.name for face in faces if not face.is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}: glyphs are made of the fonts that matplotlib"
            " brings. Install it again (pip install --force-reinstall matplotlib)"
        )
    digest = hashlib.sha256(b"".join(face.read_bytes() for face in faces)).hexdigest()[:16]
    stored = _cache_folder() / f"glyphs-{_VERSION}-{digest}.npz"
    fields = [field.name for field in dataclasses.fields(Glyphs)]
    if stored.is_file():
        try:
            with np.load(stored, allow_pickle=False) as arrays:
                return Glyphs(**{name: arrays[name] for name in fields})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # Damaged, or half a file: rendered again.
    glyphs = _rendered(faces)
    _store(stored, {name: getattr(glyphs, name) for name in fields})
    return glyphs


def _fonts() -> pathlib.Path:
    import matplotlib

    return pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def _cache_folder() -> pathlib.Path:
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "upcycle_jax"


def _store(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an archive at once, or not at all: a full or read-only disk only costs time."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)


def _characters(faces: list[pathlib.Path]) -> list[tuple[int, list[int]]]:
    """Visible characters that enough faces have, each with the faces that have it."""
    from fontTools.ttLib import TTFont

    having: dict[int, list[int]] = {}
    for number, face in enumerate(faces):
        with TTFont(face, lazy=True) as font:
            for code_point in font.getBestCmap():
                having.setdefault(code_point, []).append(number)
    return [
        (code_point, numbers)
        for code_point, numbers in sorted(having.items())
        # Control characters, spaces and combining marks show nothing of their own.
        if len(numbers) >= MIN_FACES and unicodedata.category(chr(code_point))[0] not in "CZM"
    ]


def _rendered(faces: list[pathlib.Path]) -> Glyphs:
    from PIL import Image, ImageDraw, ImageFont

    # The basic layout engine: the other one fails on some characters.
    fonts = [
        ImageFont.truetype(str(face), 36, layout_engine=ImageFont.Layout.BASIC) for face in faces
    ]

    def render(font: ImageFont.FreeTypeFont, text: str) -> np.ndarray | None:
        """Uint8 `[SIDE, SIDE]` with the glyph in the middle; None where it shows nothing."""
        left, top, right, bottom = font.getbbox(text)
        width, height = right - left, bottom - top
        if not width or not height:
            return None
        image = Image.new("L", (SIDE, SIDE))
        at = ((SIDE - width) / 2 - left, (SIDE - height) / 2 - top)
        ImageDraw.Draw(image).text(at, text, fill=255, font=font)
        return np.asarray(image)

    seen: set[bytes] = set()
    images: list[np.ndarray] = []
    classes: list[int] = []
    code_points: list[int] = []
    of_faces: list[int] = []
    for code_point, numbers in _characters(faces):
        views = [(number, render(fonts[number], chr(code_point))) for number in numbers]
        shown = [(number, view) for number, view in views if view is not None and view.any()]
        # Greek Alpha and Latin A are one picture in the first face, and one class.
        key = shown[0][1].tobytes() if shown else b""
        if len(shown) < MIN_FACES or key in seen:
            continue
        seen.add(key)
        images += [view for _, view in shown]
        of_faces += [number for number, _ in shown]
        classes += [len(code_points)] * len(shown)
        code_points.append(code_point)
    return Glyphs(
        np.stack(images),
        np.asarray(classes, np.int32),
        np.asarray(code_points, np.int32),
        np.asarray(of_faces, np.int32),
    )


def is_held_out(classes: np.ndarray) -> np.ndarray:
    """Bool: which classes are not trained on."""
    return classes % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
