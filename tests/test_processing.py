"""Prompts: pictures and video, placeholders, the prunable mask, positions, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

from hybridkv.model import CheckpointError, InputError, Processor
from hybridkv.model.rope import prompt_positions
from hybridkv.model.vision import PART, in_parts
from tests.test_pictures import picture

FIELD = Path(__file__).parent / "field"


@pytest.fixture(scope="module")
def processor(vlm):
    return Processor.from_pretrained(vlm)


@pytest.fixture(scope="module")
def text_only(llama):
    return Processor.from_pretrained(llama)


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
    pytest.importorskip("av")
    prompt = processor("?", videos=[FIELD / "vfr.mp4"], fps=2.0)  # 7.05 seconds
    assert prompt.grids == [(7, 20, 28)] and prompt.seconds_per_grid == [pytest.approx(2 * 7.05 / 14)]
    upright = processor("?", videos=[FIELD / "rot90.mp4"])
    assert upright.grids[0][0] == 2 and upright.grids[0][1] > upright.grids[0][2]
    assert torch.equal(processor("?", videos=str(FIELD / "rot90.mp4")).patches, upright.patches)  # a single path


def test_a_single_picture_needs_no_list(processor, tmp_path):
    picture().save(tmp_path / "a.png")
    several = processor("?", images=[picture()])
    for single in (picture(), tmp_path / "a.png", str(tmp_path / "a.png"), (picture(),)):
        prompt = processor("?", images=single)
        assert torch.equal(prompt.patches, several.patches) and torch.equal(prompt.input_ids, several.input_ids)


def test_bad_prompts_are_refused(processor, text_only):
    with pytest.raises(InputError, match="text-only"):
        text_only("?", images=[picture()])
    with pytest.raises(InputError, match=r"picture of 9000 x 28 pixels can't be used: .*aspect ratio"):
        processor("?", images=[picture(9000, 28)])
    with pytest.raises(InputError, match="same size"):
        processor("?", videos=[[picture(56, 56), picture(84, 84)]])
    with pytest.raises(InputError, match="at least one frame"):
        processor("?", videos=[[]])


@pytest.mark.parametrize("what", ["prompt", "context"])
def test_text_must_be_text(processor, what):
    give = lambda value: processor(**({"text": value} if what == "prompt" else {"text": "?", "context": value}))  # noqa: E731
    for blank in (" ", "\n\t", "\u3000") + (("",) if what == "prompt" else ()):
        with pytest.raises(InputError, match=f"the {what} is empty"):
            give(blank)
    for value in (None, 3, b"bytes", ["a"], {"a": 1}):
        with pytest.raises(InputError, match=rf"the {what} must be text \(str\), not {type(value).__name__}"):
            give(value)
    for half in ("a\ud800", "\udfff b", "a\udc80"):
        with pytest.raises(InputError, match=f"the {what} holds half of a surrogate pair at character"):
            give(half)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), -float("inf"), "2", None, True, 1e-9, 10**30])
def test_fps_has_bounds(processor, value):
    with pytest.raises(InputError, match=r"fps must be a number of frames a second between 0.001 and 1,000, not"):
        processor("?", videos=[[picture()]], fps=value)


@pytest.mark.parametrize("name", ["min_pixels", "max_pixels"])
@pytest.mark.parametrize("value", [0, -5, 783, 12845057, 10**12, 10**30, 1e5, float("nan"), "784", True])
def test_pixels_have_bounds(processor, text_only, name, value):
    for p, images in ((processor, [picture()]), (text_only, [])):
        with pytest.raises(InputError, match=f"{name} must be a whole number from 784 to 12,845,056, not "):
            p("?", images=images, **{name: value})
    assert processor("?", images=[picture()], **{name: 12845056 if name == "max_pixels" else np.int64(784)}).grids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(images=None), "images must be a list of paths or Pillow images, not NoneType"),
        (dict(images={"a.png": 1}), "images must be a list of paths or Pillow images, not dict"),
        (dict(images=5), "not int"),
        (dict(images=[picture(), None]), r"images\[1\] must be a path or a Pillow image, not NoneType"),
        (dict(images=b"a.png"), r"images\[0\] must be a path or a Pillow image, not int"),
        (dict(images=["missing.png"]), "missing.png does not exist"),
        (dict(videos=picture()), "videos must be a list of paths or lists of frames, not Image"),
        (dict(videos=[picture()]), r"videos\[0\] must be a path or a list of frames, not Image"),
        (dict(videos=[None]), r"videos\[0\] must be a path or a list of frames, not NoneType"),
        (dict(videos=[[picture(), 3]]), r"videos\[0\]\[1\] must be a path or a Pillow image, not int"),
    ],
)
def test_inputs_of_a_wrong_kind_are_named(processor, arguments, message):
    with pytest.raises(InputError, match=message):
        processor("?", **arguments)


def edited(vlm: Path, folder: Path, file: str, **changes) -> Path:
    shutil.copytree(vlm, folder)
    raw = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return folder


def test_pixel_bounds_by_either_name(vlm, processor, tmp_path):
    folder = shutil.copytree(vlm, tmp_path / "copy")
    shutil.copy(FIELD / "preprocessor-min-max-pixels.json", folder / "preprocessor_config.json")
    for size in ((112, 84), (20, 30)):
        expected, got = (p("?", images=[picture(*size)]) for p in (processor, Processor.from_pretrained(folder)))
        assert torch.equal(got.patches, expected.patches) and got.grids == expected.grids
    size = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    small = edited(vlm, tmp_path / "small", "preprocessor_config.json", min_pixels=None, max_pixels=None, size=size)
    assert Processor.from_pretrained(small)("?", images=[picture(560, 560)]).visual_tokens == 4


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("preprocessor_config.json", dict(patch_size=16), "patch_size 16, config.json has 14"),
        ("preprocessor_config.json", dict(merge_size=4), "merge_size 4, config.json has 2"),
        ("preprocessor_config.json", dict(min_pixels=10**6, max_pixels=10**4), "two areas in pixels"),
        ("preprocessor_config.json", dict(size={"height": 5, "width": 5}, min_pixels=None), "can't be loaded: size"),
        ("preprocessor_config.json", dict(size={"height": 5, "width": 5}, min_pixels=None, max_pixels=None), "areas"),
        ("preprocessor_config.json", dict(image_mean=[0.5]), "can't be used: mean must have 3 elements"),
        ("preprocessor_config.json", dict(image_std="grey"), "can't be"),
        ("preprocessor_config.json", dict(image_std=[0, 1, 1]), "does not make the patches"),
        ("tokenizer.json", dict(model={"type": "none"}), "can't be loaded"),
        ("tokenizer.json", dict(added_tokens=5), "can't be loaded"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.filterwarnings("ignore:invalid value")
def test_files_that_do_not_fit_are_named(vlm, tmp_path, file, changes, message):
    with pytest.raises(CheckpointError, match=message) as raised:
        Processor.from_pretrained(edited(vlm, tmp_path / "copy", file, **changes))
    assert "\n" not in str(raised.value)


def test_placeholder_ids_must_be_those_of_the_tokenizer(vlm, tmp_path):
    processor = Processor.from_pretrained(edited(vlm, tmp_path / "copy", "config.json", image_token_id=5))
    with pytest.raises(CheckpointError, match=r"image_token_id or video_token_id in config.json"):
        processor("?", images=[picture()])


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


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=6))
def test_many_pictures_and_long_videos_are_looked_at_in_parts(grids):
    parts = in_parts(grids)
    frames = [(h, w) for part in parts for t, h, w in part for _ in range(t)]
    assert frames == [(h, w) for t, h, w in grids for _ in range(t)]  # each frame once, in their order
    sizes = [sum(t * h * w for t, h, w in part) for part in parts]
    for part, size, following in zip(parts, sizes, [*parts[1:], None], strict=True):
        assert size <= PART or [t for t, _, _ in part] == [1]
        assert following is None or size + following[0][1] * following[0][2] > PART  # no more parts than it takes
