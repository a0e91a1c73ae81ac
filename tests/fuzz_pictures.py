"""Random pictures: valid files of many kinds against Pillow's own reading, and files with damaged bytes.

    python -m tests.fuzz_pictures --cases 3000

A valid file must give the pixels that Pillow gives, a damaged one an `InputError` or what Pillow makes of it.
"""

import argparse
import io
import random
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from hybridkv.model import InputError
from hybridkv.model.pictures import open_image

WRITES = {  # the modes that a format holds
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I;16B"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P"),
    "BMP": ("1", "L", "P", "RGB"),
    "JPEG2000": ("L", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB"),
    "TGA": ("L", "P", "RGB", "RGBA"),
    "ICO": ("RGBA",),
}
WITH_EXIF = ("PNG", "JPEG", "TIFF", "WEBP")


def some_picture(rng: random.Random, mode: str) -> Image.Image:
    width, height = rng.randint(1, 60), rng.randint(1, 60)
    random_bytes = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode in ("I;16", "I;16B"):
        return Image.fromarray(random_bytes[..., :2].copy().view(np.uint16)[..., 0]).convert("I").convert(mode)
    if mode in ("LAB", "CMYK"):
        return Image.frombytes(mode, (width, height), random_bytes[..., : len(mode)].tobytes())
    return Image.fromarray(random_bytes).convert(mode)


def some_file(rng: random.Random, formats: list[str]) -> tuple[bytes, str]:
    """An encoded picture, and its format."""
    kind = rng.choice(formats)
    image = some_picture(rng, rng.choice(WRITES[kind]))
    options = {}
    if kind in WITH_EXIF and rng.random() < 0.7:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = rng.randint(1, 8) if kind == "TIFF" else rng.randint(0, 9)  # libtiff checks
        if rng.random() < 0.5:
            exif[ExifTags.Base.XResolution] = 72.0
            exif[ExifTags.Base.Software] = "camera"
            exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = 0.01
        options["exif"] = exif
    if kind in ("PNG", "GIF") and image.mode in ("P", "L") and rng.random() < 0.3:
        options["transparency"] = rng.randrange(256)
    if kind == "WEBP":
        options["lossless"] = True
    if kind == "TIFF" and rng.random() < 0.5 and image.mode not in ("I;16B", "LAB"):
        options["compression"] = rng.choice(["tiff_lzw", "tiff_adobe_deflate", "packbits"])
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue(), kind


def pillow_reads(source) -> np.ndarray:
    """(H, W, 3): Pillow's own turning and flattening, in other steps than those that are tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(source)
        image.load()
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:  # the orientation alone may still be there
            try:
                turn = image.getexif().get(ExifTags.Base.Orientation)
            except Exception:
                turn = None
            image = image.convert("RGBA") if image.mode in ("1", "P") else image
            pixels = turned(np.asarray(image), turn)
            image = Image.frombytes(image.mode, pixels.shape[1::-1], pixels.tobytes())
    if image.mode.startswith("I;16"):
        return np.repeat((np.asarray(image).astype(np.int64) // 256).astype(np.uint8)[..., None], 3, axis=2)
    rgba = image.convert("RGBA") if image.mode not in ("CMYK", "YCbCr", "LAB", "HSV") else image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(rgba.convert("RGB"), mask=rgba.getchannel("A") if rgba.mode == "RGBA" else None)
    return np.asarray(white)


def turned(pixels: np.ndarray, orientation: int | None) -> np.ndarray:
    """An orientation as TIFF 6.0 defines it: where the stored first row and first column belong."""
    swap = (lambda x: x.swapaxes(0, 1)) if orientation in (5, 6, 7, 8) else (lambda x: x)
    pixels = swap(pixels)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def damaged(rng: random.Random, whole: bytes) -> bytes:
    """A file with bytes changed, mostly in its headers, or cut off, or with a piece taken out or put in."""
    data = bytearray(whole)
    exif = max(data.find(b"Exif\0\0"), data.find(b"eXIf"), data.find(b"EXIF"))
    for _ in range(rng.randint(1, 6)):
        place = rng.random()
        if place < 0.4 and exif >= 0:
            at = min(exif + rng.randrange(120), len(data) - 1)
        else:
            at = rng.randrange(min(len(data), 200 if place < 0.8 else len(data)))
        data[at] = rng.choice([0, 1, 255, 127, rng.randrange(256), data[at] ^ (1 << rng.randrange(8))])
    if rng.random() < 0.15:
        del data[rng.randrange(len(data)) :]
    if rng.random() < 0.1 and data:
        at = rng.randrange(len(data))
        data[at : at + rng.randint(0, 8)] = rng.randbytes(rng.randint(0, 8))
    return bytes(data)


def fuzz(cases: int, seed: int) -> dict:
    """Counts of what was tried and what went wrong: `wrong` pixels, `tracebacks`, `refused_wrongly`; the slowest."""
    rng, counts, examples = random.Random(seed), Counter(wrong=0, tracebacks=0, refused_wrongly=0), []
    slowest = 0.0
    formats = [f for f in WRITES if f != "JPEG2000" or "JPEG2000" in Image.SAVE]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "picture"
        for case in range(cases):
            data, kind = some_file(rng, formats)
            valid = case % 3 == 0
            data = data if valid else damaged(rng, data)
            path.write_bytes(data)
            counts["valid" if valid else "damaged"] += 1
            try:
                expected = pillow_reads(path)
            except Exception:
                expected = None
            start = time.perf_counter()
            try:
                got, problem = open_image(path), None
                if got.mode != "RGB" or (expected is not None and not np.array_equal(np.asarray(got), expected)):
                    problem = "wrong"
            except InputError as e:
                counts["refused"] += 1
                meant = any(word in str(e) for word in ("animated", "pages", "fixed range"))
                meant |= kind == "TIFF"  # a damaged second page, which Pillow does not look at
                problem = "refused_wrongly" if valid or (expected is not None and not meant) else None
                problem = "wrong" if len(str(e)) > 400 or "\n" in str(e) else problem
                message = str(e)
            except Exception as e:  # what is being looked for
                message, problem = repr(e), "tracebacks"
            slowest = max(slowest, time.perf_counter() - start)
            if problem:
                counts[problem] += 1
                examples.append((case, kind, problem, message if problem != "wrong" else ""))
    return {**counts, "slowest": slowest, "examples": examples[:5]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(fuzz(args.cases, args.seed))
