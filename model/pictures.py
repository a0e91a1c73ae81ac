"""Opening pictures: a file or Pillow image in, an upright RGB picture out, or one `InputError` that says why not."""

import os
import re
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

Picture = str | Path | Image.Image

ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF", "FLI")
FIRST_MEANT = ("MPO",)  # phones add a second view or a brightness map to the picture itself
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class InputError(ValueError):
    """A prompt, picture or video that can't be used; the message says what is wrong and what to do."""


def short(name: object) -> str:
    """A name for a message: printable, on one line, and not longer than one."""
    text = str(name)
    text = text if text.isprintable() and text else ascii(text)
    return text if len(text) <= 120 else f"{text[:70]}...{text[-40:]}"


def reason(error: Exception) -> str:
    """Why, in one line."""
    return short(" ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__)


def file_path(source: str | Path) -> str:
    """The path of a file that can be opened; `~` is the home folder.

    Raises:
        InputError: a URL or data URI, or nothing there, or no regular file.
    """
    name = short(source)
    if re.match(r"data:|\w[\w+.-]*://", str(source), re.IGNORECASE):
        raise InputError(f"{name} is not fetched: URLs and data URIs are not read, save it to a file first")
    try:
        path = os.path.expanduser(source)
        mode = os.stat(path).st_mode
    except FileNotFoundError as e:
        raise InputError(f"{name} does not exist") from e
    except (OSError, ValueError) as e:  # ValueError: characters that no path can hold
        raise InputError(f"{name} can't be read: {reason(e)}") from e
    if stat.S_ISDIR(mode):
        raise InputError(f"{name} can't be read: it is a folder, give a file in it")
    if not stat.S_ISREG(mode):
        raise InputError(f"{name} can't be read: it is a device or pipe, save what it gives to a file first")
    return path


def open_image(source: Picture, name: str = "image") -> Image.Image:
    """An upright RGB picture. Transparency is laid over white; 16-bit grey is scaled to 8 bits.

    Of a phone's photo with several views (MPO) the first is taken.

    Args:
        source: a path or a Pillow image.
        name: what messages call a Pillow image; a path has its own.

    Raises:
        InputError: missing, unreadable, animated, of several pages, too large to decode safely, or of a mode without a
            clear meaning.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                return _rgb(_upright(source, name), name)
            if not isinstance(source, str | Path):
                raise InputError(f"{name} must be a path or a Pillow image, not {type(source).__name__}")
            name = short(source)
            with Image.open(file_path(source)) as image:
                return _rgb(_upright(image, name), name)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        limit = Image.MAX_IMAGE_PIXELS
        raise InputError(f"{name} has more than {limit:,} pixels and is not decoded: scale it down first") from e
    except UnidentifiedImageError as e:
        raise InputError(f"{name} is not a picture that Pillow can read") from e
    except Exception as e:  # what damaged bytes make Pillow's decoders raise has no end: TypeError, struct.error, ...
        raise InputError(f"{name} can't be read: {reason(e)}") from e


def _upright(image: Image.Image, name: str) -> Image.Image:
    """The decoded picture, turned as its EXIF block says. A damaged block says nothing."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format in ANIMATIONS:
        raise InputError(f"{name} is animated ({frames} frames): give one frame, or use it as a video")
    if frames > 1 and image.format not in FIRST_MEANT:
        raise InputError(f"{name} has {frames} pages: save the one that is meant as a picture of its own")
    if not all(image.size):
        raise InputError(f"{name} has no pixels ({image.width} x {image.height})")
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # as open-ended as in decoding; the picture itself is whole
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image, name: str) -> Image.Image:
    clear = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        values = np.asarray(image)  # (H, W), in either byte order
        grey = (values >> 8).astype(np.uint8)
        if clear is not None:
            grey[values == clear] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise InputError(
            f"{name} has {image.mode!r} pixels without a fixed range: convert it to 8 bits a channel first"
        )
    if image.mode == "La":  # Pillow converts it to nothing else
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
