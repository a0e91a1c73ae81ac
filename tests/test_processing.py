"""Prompts: pictures of every kind, video, placeholders, the prunable mask, and what is refused."""

import shutil

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from hybridkv.model import InputError, Processor
from hybridkv.model.processing import open_image, read_video
from hybridkv.model.rope import prompt_positions


@pytest.fixture(scope="module")
def processor(vlm):
    return Processor.from_pretrained(vlm)


@pytest.fixture(scope="module")
def text_only(llama):
    return Processor.from_pretrained(llama)


def picture(width=112, height=84, seed=0, mode="RGB"):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)).convert(
        mode
    )


def test_placeholders_are_expanded_and_prunable(processor):
    prompt = processor("What?", images=[picture(112, 84), picture(56, 140, 1)])
    assert prompt.grids == [(1, 6, 8), (1, 10, 4)]
    assert prompt.visual_tokens == 12 + 10 == int((prompt.input_ids == processor.cfg.image_token_id).sum())
    assert torch.equal(prompt.prunable, prompt.input_ids == processor.cfg.image_token_id)
    assert prompt.patches.shape == (48 + 40, 3 * 2 * 14 * 14)
    text = processor.tokenizer.decode(prompt.input_ids)
    assert text.count("<|vision_start|>") == 2 and text.rstrip().endswith("assistant")


def test_context_is_prunable_and_the_question_is_not(processor, text_only):
    for p in (processor, text_only):
        prompt = p("Who?", context="  Ada wrote the first programme.\n")
        assert p.tokenizer.decode(prompt.input_ids[prompt.prunable]) == "Ada wrote the first programme."
        assert "Who?" in p.tokenizer.decode(prompt.input_ids[~prompt.prunable])
        assert prompt.visual_tokens == 0 and prompt.patches is None


def test_a_tokenizer_without_chat_template_gets_the_plain_text(text_only, monkeypatch):
    monkeypatch.setattr(text_only.tokenizer, "chat_template", None)
    prompt = text_only("b", context="a")
    assert text_only.tokenizer.decode(prompt.input_ids) == "a\n\nb"


def test_a_chat_template_in_a_file_of_its_own(vlm, tmp_path):
    folder = shutil.copytree(vlm, tmp_path / "copy")
    (folder / "chat_template.jinja").unlink()
    assert not Processor.from_pretrained(folder).tokenizer.chat_template
    (folder / "chat_template.json").write_text('{"chat_template": "{{ messages[0].content }}!"}')
    prompt = Processor.from_pretrained(folder)("hi")
    assert len(prompt.input_ids) == len("hi!")


def test_pixels_bound_the_number_of_tokens(processor):
    large = picture(560, 560)
    assert processor("?", images=[large]).visual_tokens == 400
    assert processor("?", images=[large], max_pixels=280 * 280).visual_tokens == 100
    assert processor("?", images=[large], max_pixels=28 * 28).visual_tokens == 1  # below the checkpoint's own minimum
    assert processor("?", images=[picture(28, 28)], min_pixels=112 * 112).visual_tokens == 16
    with pytest.raises(InputError, match="above max_pixels"):
        processor("?", images=[large], min_pixels=10**6, max_pixels=10**4)


def test_video_frames_pair_up(processor):
    """A patch of a video holds the same place of two successive frames; a last odd frame is doubled."""
    frames = [picture(56, 56, i) for i in range(3)]
    prompt = processor("?", videos=[frames], fps=2.0, max_pixels=56 * 56)
    assert prompt.grids == [(2, 4, 4)] and prompt.seconds_per_grid == [1.0]
    singles = [processor("?", images=[f]).patches for f in frames]
    view = lambda p: rearrange(p, "n (c s d) -> n c s d", c=3, s=2)  # noqa: E731
    first, second = view(prompt.patches).split(16)
    for got, (a, b) in ((first, (0, 1)), (second, (2, 2))):
        assert torch.equal(got[:, :, 0], view(singles[a])[:, :, 0])
        assert torch.equal(got[:, :, 1], view(singles[b])[:, :, 1])


def test_video_files(processor, tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for i in range(30):
            for packet in stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 64), (8 * i, 0, 0)))):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    frames, rate = read_video(path, 2.0)
    assert len(frames) == 6 and rate == 2.0
    assert frames[5].getpixel((9, 9))[0] > frames[1].getpixel((9, 9))[0] + 100
    prompt = processor("?", videos=[path], fps=2.0)
    assert prompt.grids[0][0] == 3 and prompt.seconds_per_grid == [1.0]
    assert len(read_video(path, 100.0)[0]) == 30  # never more than there are

    (tmp_path / "broken.mp4").write_bytes(path.read_bytes()[:200])
    for bad, message in (("broken.mp4", "can't be read as video"), ("missing.mp4", "does not exist")):
        with pytest.raises(InputError, match=message):
            read_video(tmp_path / bad, 2.0)
    import hybridkv.model.processing

    hybridkv.model.processing.MAX_FRAMES, before = 4, hybridkv.model.processing.MAX_FRAMES
    try:
        with pytest.raises(InputError, match="more than 4 frames"):
            read_video(path, 10.0)
    finally:
        hybridkv.model.processing.MAX_FRAMES = before


def test_transparency_lies_over_white(tmp_path):
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    assert open_image(clear).getpixel((5, 5)) == (255, 255, 255)
    palette = Image.new("P", (40, 40), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    assert open_image(tmp_path / "p.png").getpixel((5, 5)) == (255, 255, 255)
    assert open_image(Image.new("LA", (9, 9), (0, 255))).getpixel((5, 5)) == (0, 0, 0)


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    Image.fromarray(np.full((40, 40), 32768, dtype=np.uint16)).save(tmp_path / "grey.png")
    assert open_image(tmp_path / "grey.png").getpixel((5, 5)) == (128, 128, 128)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode):
    assert open_image(picture(mode=mode)).mode == "RGB"


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture(112, 56).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (56, 112)


def test_bad_pictures_are_refused(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    picture().save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    picture().save(tmp_path / "moving.gif", save_all=True, append_images=[picture(seed=1)])
    cases = {
        "missing.png": "does not exist",
        "text.png": "not a picture",
        "cut.png": "can't be read",
        "moving.gif": r"animated \(2 frames\)",
        ".": "can't be read",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message):
            open_image(tmp_path / name)
    with pytest.raises(InputError, match="without a fixed range"):
        open_image(Image.new("F", (20, 20)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 112 * 84 - 1)  # a warning in Pillow
    with pytest.raises(InputError, match="more than 9,407 pixels"):
        open_image(tmp_path / "whole.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # an error in Pillow
    with pytest.raises(InputError, match="scale it down"):
        open_image(tmp_path / "whole.png")


def test_bad_prompts_are_refused(processor, text_only, monkeypatch):
    with pytest.raises(InputError, match="text-only"):
        text_only("?", images=[picture()])
    with pytest.raises(InputError, match="empty"):
        processor("  ")
    with pytest.raises(InputError, match=r"placeholder <\|image_pad\|>"):
        processor("what is <|image_pad|>?")
    with pytest.raises(InputError, match="aspect ratio"):
        processor("?", images=[picture(9000, 28)])
    with pytest.raises(InputError, match="same size"):
        processor("?", videos=[[picture(56, 56), picture(84, 84)]])
    with pytest.raises(InputError, match="at least one frame"):
        processor("?", videos=[[]])
    monkeypatch.setattr(processor.tokenizer, "chat_template", "{{ messages[0].content[-1].text }}")
    with pytest.raises(InputError, match="no place for 1 pictures"):
        processor("?", images=[picture()])
    monkeypatch.setattr(processor.tokenizer, "chat_template", "{{ messages[0].content | upper }}")
    with pytest.raises(InputError, match="changes the context"):
        processor("?", context="lower case")


IMAGE, VIDEO = 1, 2


def test_positions_of_text_and_images():
    ids = torch.tensor([0, 0, *[IMAGE] * 6, 0, 0])
    positions = prompt_positions(ids, IMAGE, VIDEO, [(1, 4, 6)], [0.0], merge=2, tokens_per_second=2)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_positions_of_video_count_seconds():
    ids = torch.tensor([0, *[VIDEO] * 6, 0])
    positions = prompt_positions(ids, IMAGE, VIDEO, [(3, 2, 4)], [1.5], merge=2, tokens_per_second=2)
    assert positions.tolist() == [[0, 1, 1, 4, 4, 7, 7, 8], [0, 1, 1, 1, 1, 1, 1, 8], [0, 1, 2, 1, 2, 1, 2, 8]]


@pytest.mark.parametrize(
    ("visual", "grids"),
    [(5, [(1, 4, 6)]), (7, [(1, 4, 6)]), (6, [(1, 4, 6)] * 2), (6, [])],
    ids=["few", "many", "none", "unused"],
)
def test_placeholders_must_match_the_inputs(visual, grids):
    ids = torch.tensor([0, *[IMAGE] * visual, 0])
    with pytest.raises(ValueError, match="placeholders"):
        prompt_positions(ids, IMAGE, VIDEO, grids, [0.0] * len(grids), merge=2, tokens_per_second=2)
