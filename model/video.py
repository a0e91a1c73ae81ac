"""Reading video files: frames spread evenly over the clip's time, upright. Needs PyAV, the `video` extra."""

import math
import struct
from fractions import Fraction
from numbers import Real
from pathlib import Path

from PIL import Image

from hybridkv.model.pictures import InputError, file_path, reason, short

MIN_FRAMES, MAX_FRAMES = 4, 768  # of a clip, as in Qwen's own tools
FPS = (0.001, 1000)
LONGEST = 10_000_000  # seconds; timestamps beyond are damaged ones

# How a display matrix moves pixels: whether x and y change places, and the sign of what becomes x and y.
TURNS = {
    (False, -1, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (False, 1, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (False, -1, -1): Image.Transpose.ROTATE_180,
    (True, 1, 1): Image.Transpose.TRANSPOSE,
    (True, 1, -1): Image.Transpose.ROTATE_90,
    (True, -1, 1): Image.Transpose.ROTATE_270,
    (True, -1, -1): Image.Transpose.TRANSVERSE,
}


def check_fps(fps: float) -> None:
    low, high = FPS
    if isinstance(fps, bool) or not isinstance(fps, Real) or not low <= fps <= high:
        raise InputError(f"fps must be a number of frames a second between {low:g} and {high:,}, not {short(fps)}")


def frames_to_take(total: int, seconds: float, fps: float) -> int:
    """How many of `total` frames that last `seconds` are taken: `smart_nframes` of qwen-vl-utils.

    About `fps` a second, at least 4, at most 768 and no more than there are, and an even number of them. (A clip of
    one frame, which is refused there, gives that frame.)
    """
    wanted = round(float(seconds) * float(fps), 6)  # 5.999999999 is 6
    return max(1, math.floor(min(max(wanted, MIN_FRAMES), MAX_FRAMES, total)) // 2 * 2)


def read_video(path: str | Path, fps: float) -> tuple[list[Image.Image], float]:
    """About `fps` frames a second of a video file, and how many it really are.

    Takes n frames (see `frames_to_take`), the i-th of them the one shown at i / n of the clip's duration, whatever
    the times between its frames, turned as its display matrix says.

    Returns:
        frames: n RGB pictures.
        rate: frames a second, n / duration.

    Raises:
        InputError: missing, unreadable or cut off, no video in it, or PyAV is not installed.
    """
    check_fps(fps)
    name = short(path)
    try:
        import av
    except ImportError as e:
        raise InputError("reading a video file needs PyAV: pip install 'hybridkv[video]'") from e
    url = f"file:{file_path(path)}"  # so that no name is taken for another protocol
    try:
        with av.open(url) as container:
            if not container.streams.video:
                raise InputError(f"{name} holds no video stream")
            stamped, start, ticks, total, seconds = _timeline(container)
        if not total:
            raise InputError(f"{name} holds no frames")
        if seconds > LONGEST:
            raise InputError(f"{name} has damaged timestamps: by them it lasts {float(seconds):,.0f} seconds")
        n = frames_to_take(total, seconds, fps)
        with av.open(url) as container:
            frames = _shown(container, n, stamped, start, ticks)
    except InputError:
        raise
    except Exception as e:  # damaged files make PyAV raise its own errors, but ValueError, MemoryError and others too
        raise InputError(f"{name} can't be read as video: {reason(e)}") from e
    if not frames:
        raise InputError(f"{name} holds no frames")
    return frames, float(n / seconds) if seconds else fps


def _timeline(container) -> tuple[bool, int, int, int, Fraction]:
    """When the frames are shown, from the packets alone.

    Returns:
        stamped: whether frames have times; if not they follow each other at a constant rate, one a tick.
        start, ticks: the first frame's time and the clip's duration, in ticks.
        total: frames.
        seconds: the duration.
    """
    stream = container.streams.video[0]
    packets = [(p.pts, p.duration or 0, p.is_discard) for p in container.demux(stream) if p.size]
    if "mp4" in container.format.name and len(packets) < stream.frames:  # others count frames that were dropped, too
        raise InputError(f"{short(container.name[5:])} is cut off: it holds {len(packets)} of {stream.frames} frames")
    packets = [(pts, duration) for pts, duration, unseen in packets if not unseen]
    total = len(packets)
    times = {pts for pts, _ in packets}
    if None in times or len(times) < total or not total:
        rate = stream.guessed_rate or stream.average_rate or 25
        return False, 0, total, total, total / Fraction(rate)
    start, (last, duration) = min(times), max(packets)
    if not duration and total > 1:
        duration = (last - start) // (total - 1)
    ticks = last + duration - start
    return True, start, ticks, total, ticks * Fraction(stream.time_base)


def _shown(container, n: int, stamped: bool, start: int, ticks: int) -> list[Image.Image]:
    """The frames that are shown at `start + i * ticks / n`, for i from 0 to n - 1."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    frames, shown = [], None
    for i, frame in enumerate(container.decode(stream)):
        at = frame.pts if stamped else i
        while shown and len(frames) < n and (at - start) * n > len(frames) * ticks:
            frames.append(_upright(shown))
        if len(frames) == n:
            return frames
        shown = frame
    while shown and len(frames) < n:
        frames.append(_upright(shown))
    return frames


def _upright(frame) -> Image.Image:
    image = frame.to_image()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))  # x' = a x + c y, y' = b x + d y
    swap = abs(b) + abs(c) > abs(a) + abs(d)
    x, y = (c, b) if swap else (a, d)
    turn = TURNS.get((swap, math.copysign(1, x), math.copysign(1, y)))
    return image if turn is None else image.transpose(turn)
