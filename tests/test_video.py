"""Video files: which frames are taken and at what rate, which way up, and what is refused."""

import random
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hybridkv.model import InputError
from hybridkv.model.video import MAX_FRAMES, frames_to_take, read_video

av = pytest.importorskip("av")
FIELD = Path(__file__).parent / "field"


def write(path: Path, times: list[float], rate=1000, codec="mpeg4") -> Path:
    """A clip with a clock of `rate`; the brightness of the frame that is shown from times[i] seconds on is 8 i."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 8_000_000
        for i, at in enumerate(times):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (8 * i,) * 3))
            frame.pts, frame.time_base = round(at * rate), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


TENTHS = [i / 10 for i in range(30)]


def which(frames: list[Image.Image]) -> list[int]:
    return [round(frame.getpixel((9, 9))[0] / 8) for frame in frames]


def smart_nframes(total_frames: int, video_fps: float, fps: float) -> int:
    """As in qwen_vl_utils/vision_process.py."""
    max_frames = min(768, total_frames) // 2 * 2
    nframes = total_frames / video_fps * fps
    return int(min(min(max(nframes, 4), max_frames), total_frames)) // 2 * 2


def test_as_many_frames_as_qwens_own_tools_take():
    rng = random.Random(0)
    for _ in range(2000):
        total, rate, fps = (
            rng.randint(2, 3000),
            rng.choice([1, 10, 24, 25, 29.97, 60]),
            rng.choice([0.1, 0.5, 1, 2, 30]),
        )
        assert frames_to_take(total, total / rate, fps) == smart_nframes(total, rate, fps)
    assert frames_to_take(1, 0.04, 2.0) == 1  # refused there
    assert frames_to_take(10**6, 10**5, 2.0) == MAX_FRAMES


def test_frames_at_a_constant_rate(tmp_path):
    path = write(tmp_path / "clip.mp4", TENTHS, 10)
    frames, rate = read_video(path, 2.0)
    assert which(frames) == [0, 5, 10, 15, 20, 25] and rate == 2.0
    frames, rate = read_video(path, 0.1)
    assert which(frames) == [0, 7, 15, 22] and rate == pytest.approx(4 / 3)  # no fewer than 4
    frames, rate = read_video(path, 100.0)
    assert which(frames) == list(range(30)) and rate == 10.0  # no more than there are


@pytest.mark.parametrize(
    "name",
    ["clip.mp4", "clip.mkv", "clip.avi", "clip.mov", "clip.m4v", "clip.webm", "clip.ts", "clip.gif", "clip.h264"],
)
def test_other_containers(tmp_path, name):
    codecs = {".mp4": "libx264", ".h264": "libx264", ".webm": "libvpx-vp9", ".ts": "mpeg2video"}
    codec = codecs.get(Path(name).suffix, "mpeg4")
    if name.endswith("gif"):
        pictures = [Image.new("P", (64, 48), i) for i in range(30)]
        for image in pictures:
            image.putpalette([n for i in range(256) for n in (8 * i % 256,) * 3])
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], duration=100)
        frames, rate = read_video(tmp_path / name, 2.0)
    else:
        step = 25 if name.endswith("ts") else 10
        times = [i / step for i in range(3 * step)][:30]
        frames, rate = read_video(write(tmp_path / name, times, step, codec), 2.0 * step / 10)
        rate = rate * 10 / step
    assert which(frames) == [0, 5, 10, 15, 20, 25] and rate == pytest.approx(2.0)


def test_a_variable_rate_is_sampled_by_time(tmp_path):
    """Ten quick frames, then one that stays for three seconds, then two of a second each."""
    path = write(tmp_path / "clip.mp4", [*TENTHS[:10], 1, 4, 5])
    frames, rate = read_video(path, 2.0)
    seconds = len(frames) / rate
    assert 5 < seconds <= 6 and len(frames) == int(seconds * 2) // 2 * 2
    times = [i * seconds / len(frames) for i in range(len(frames))]
    starts = [*np.arange(0, 1, 0.1), 1, 4, 5]
    assert which(frames) == [max(i for i, start in enumerate(starts) if start <= t + 1e-9) for t in times]


def test_a_variable_rate_from_the_field():
    """20 frames in the first second, then one every two seconds; 7.05 seconds in all."""
    frames, rate = read_video(FIELD / "vfr.mp4", 2.0)
    assert len(frames) == 14 and rate == pytest.approx(14 / 7.05)
    with av.open(str(FIELD / "vfr.mp4")) as container:
        decoded = [(frame.time, frame.to_image()) for frame in container.decode(video=0)]
    for i, frame in enumerate(frames):
        shown = [image for at, image in decoded if at <= i * 7.05 / 14 + 1e-9][-1]
        assert frame.tobytes() == shown.tobytes()


MATRICES = {  # of a track header; what they do to an upright picture
    (1, 0, 0, 1): None,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # a quarter turn clockwise
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_frames_are_upright(tmp_path, matrix):
    data = bytearray((FIELD / "rot90.mp4").read_bytes())
    at = data.find(b"tkhd") + 44
    a, b, c, d = (n * 65536 for n in matrix)
    assert struct.unpack(">9i", data[at : at + 36]) == (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "clip.mp4").write_bytes(data)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        first = next(container.decode(video=0))
        stored, turn = first.to_image(), MATRICES[matrix]
        if matrix[0] * matrix[3] - matrix[1] * matrix[2] == 1 and turn is not None:  # a turn, as PyAV names it
            assert (first.rotation % 360) == {
                Image.Transpose.ROTATE_90: 90,
                Image.Transpose.ROTATE_180: 180,
                Image.Transpose.ROTATE_270: 270,
            }[turn]
    expected = stored if turn is None else stored.transpose(turn)
    assert read_video(tmp_path / "clip.mp4", 2.0)[0][0].tobytes() == expected.tobytes()
    assert read_video(tmp_path / "clip.mp4", 2.0)[0][0].size == expected.size


def test_a_clip_from_a_phone_held_upright():
    frames, rate = read_video(FIELD / "rot90.mp4", 2.0)
    assert {frame.size for frame in frames} == {(84, 112)} and len(frames) == 4 and rate == 4.0


def test_one_frame_and_odd_names(tmp_path):
    path = write(tmp_path / "a:b %d [1].mp4", [0])
    frames, rate = read_video(path, 2.0)
    assert which(frames) == [0] and rate > 0
    assert which(read_video(str(write(tmp_path / "three.mp4", TENTHS[:3], 10)), 2.0)[0]) == [0, 1]


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), -float("inf"), "2", None, True, 1e-9, 1e9, 10**30])
def test_fps_has_bounds(fps):
    with pytest.raises(InputError, match=r"fps must be a number of frames a second between 0.001 and 1,000, not"):
        read_video(FIELD / "vfr.mp4", fps)


def test_bad_files_are_refused(tmp_path):
    whole = (FIELD / "vfr.mp4").read_bytes()
    (tmp_path / "broken.mp4").write_bytes(whole[:200])
    (tmp_path / "text.mp4").write_text("no video")
    picture = Image.new("RGB", (20, 20))
    picture.save(tmp_path / "picture.png")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    cases = {
        "broken.mp4": "can't be read as video",
        "text.mp4": "can't be read as video",
        "missing.mp4": "does not exist",
        "sound.wav": "holds no video stream",
        ".": "it is a folder",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message):
            read_video(tmp_path / name, 2.0)
    with pytest.raises(InputError, match="is not fetched"):
        read_video("https://example.org/a.mp4", 2.0)


def test_a_clip_that_is_cut_off_is_refused(tmp_path):
    path = write(tmp_path / "clip.mp4", TENTHS, 10)
    whole = path.read_bytes()
    assert len(read_video(path, 2.0)[0]) == 6
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(InputError, match=r"cut off|can't be read as video"):
        read_video(path, 2.0)


def test_damaged_clips_are_read_or_refused(tmp_path):
    rng, outcomes = random.Random(0), []
    for name in ("rot90.mp4", "vfr.mp4"):
        whole = (FIELD / name).read_bytes()
        moov = whole.find(b"moov")
        for _ in range(30):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 5)):
                data[rng.randrange(rng.choice([0, moov]), len(data))] = rng.randrange(256)
            (tmp_path / "clip.mp4").write_bytes(data)
            try:
                frames, rate = read_video(tmp_path / "clip.mp4", 2.0)
                assert 1 <= len(frames) <= MAX_FRAMES and 0 < rate < 10**6
                outcomes.append("read")
            except InputError as e:
                assert "\n" not in str(e) and len(str(e)) < 300
                outcomes.append("refused")
    assert set(outcomes) == {"read", "refused"}
