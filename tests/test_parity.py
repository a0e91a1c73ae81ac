"""The model against transformers: tiny random checkpoints saved by transformers, loaded here, in float32.

Equal are the logits of text, images, and videos whose last time position is below max(height, width) of their grid in
tokens. After a longer video the positions differ from transformers 5.3 and later by decision (`model/rope.py`): there
the logits are equal once transformers is given our positions.
"""

import inspect
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demo import tiny_vlm
from hybridkv import Engine, HybridConfig
from hybridkv.hf_prefill import transformers_version
from hybridkv.model import Model, Processor, Prompt, decoder, from_pretrained, vision
from hybridkv.model.rope import prompt_positions

TOLERANCE = 1e-4  # on logits of about unit size


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def skip_fractions(*seconds: float) -> None:
    """transformers 5.17, and some after it, cuts off fractions of the seconds that a video's step takes."""
    from transformers import Qwen2_5_VLModel

    cut = "int(next(second_per_grid_ts))" in inspect.getsource(Qwen2_5_VLModel.get_rope_index)
    if cut and any(s % 1 for s in seconds):
        pytest.skip("this transformers counts whole seconds")


def save_vlm(folder: Path, heads: int, kv_heads: int, tie: bool):
    """A random Qwen2.5-VL of transformers, saved; returns it."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    raw = tiny_vlm.config(
        hidden_size=16 * heads, heads=heads, kv_heads=kv_heads, head_dim=16, layers=3, vision_layers=3, tie=tie
    )
    raw = {k: v for k, v in raw.items() if k not in ("architectures", "head_dim")} | {"bos_token_id": None}
    torch.manual_seed(heads)
    reference = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**raw)).eval()
    for name, p in reference.named_parameters():  # layers that mix strongly: continuations that do not just repeat
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.25 if "layers" in name and p.dim() > 1 else 0.1)
    reference.save_pretrained(folder)
    tiny_vlm.save_processing(folder)
    return reference


@pytest.fixture(
    scope="module", params=[(4, 4, False), (4, 2, True), (6, 1, False), (7, 1, False)], ids=["G1", "G2", "G6", "G7"]
)
def pair(request, tmp_path_factory):
    """transformers' model, ours, and the processor, for group sizes 1, 2, 6 and 7."""
    folder = tmp_path_factory.mktemp("parity")
    reference = save_vlm(folder, *request.param)
    return reference, from_pretrained(folder, progress=False), Processor.from_pretrained(folder)


def reference_inputs(model: Model, prompt: Prompt) -> dict:
    """What transformers wants for the same prompt."""
    ids, cfg = prompt.input_ids[None], model.cfg
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.grids:
        kinds = (ids == cfg.image_token_id).int() + 2 * (ids == cfg.video_token_id).int()
        images = [i for i, s in enumerate(prompt.seconds_per_grid) if s == 0]
        sizes = [t * h * w for t, h, w in prompt.grids]
        parts = prompt.patches.split(sizes)
        inputs["mm_token_type_ids"] = kinds
        for name, chosen in (("image", images), ("video", [i for i in range(len(sizes)) if i not in images])):
            if chosen:
                inputs[f"{name}_grid_thw"] = torch.tensor([prompt.grids[i] for i in chosen])
                inputs["pixel_values" if name == "image" else "pixel_values_videos"] = torch.cat(
                    [parts[i] for i in chosen]
                )
        if len(images) < len(sizes):
            seconds = [s for s in prompt.seconds_per_grid if s]
            inputs["second_per_grid_ts"] = torch.tensor(seconds)
    return inputs


def ours(model: Model, prompt: Prompt) -> torch.Tensor:
    x, positions = model.embed(prompt)
    return model.logits(model(x, positions))


PROMPTS = {
    "text": dict(text="What is the tallest mountain?"),
    "one image": dict(text="Describe it.", images=[picture(280, 196)]),
    "odd image": dict(text="Describe it.", images=[picture(150, 333)]),
    "several images": dict(text="Compare.", images=[picture(90, 64), picture(300, 150, 1), picture(56, 400, 2)]),
    "video": dict(text="What happens?", videos=[[picture(160, 120, i) for i in range(5)]]),
    "slow video": dict(text="What happens?", videos=[[picture(160, 120, i) for i in range(4)]], fps=1.5),
    "image and video": dict(
        text="?", images=[picture(90, 64)], videos=[[picture(100, 100, i) for i in range(4)]], fps=4.0
    ),
}


WHOLE_SECONDS = pytest.mark.skipif(
    transformers_version() < (5, 18), reason="transformers before 5.18 takes a frame's seconds as a whole number"
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=WHOLE_SECONDS if name == "image and video" else ()) for name in PROMPTS]
)
@pytest.mark.parametrize("parts", [False, True], ids=["whole", "in parts"])
def test_logits(pair, name, parts, monkeypatch):
    """Also where tokens go through feed-forward layers in slices, and frames are looked at in parts."""
    if parts:
        monkeypatch.setattr(decoder, "SLICE", 7)
        monkeypatch.setattr(vision, "PART", 40)
    reference, model, processor = pair
    prompt = processor(**PROMPTS[name])
    skip_fractions(*prompt.seconds_per_grid)
    expected = reference(**reference_inputs(model, prompt)).logits
    actual = ours(model, prompt)
    assert expected.std() > 0.1  # a model whose logits are all alike would pass anything
    assert (actual - expected).abs().max() < TOLERANCE


def test_a_vision_tower_with_another_rope_theta(tmp_path):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    raw = {k: v for k, v in tiny_vlm.config(vision_layers=3).items() if k != "head_dim"} | {"bos_token_id": None}
    raw["vision_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 7.0}
    reference = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**raw)).eval()
    for p in reference.model.visual.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.1)
    reference.save_pretrained(tmp_path)
    visual, patches, grid = from_pretrained(tmp_path, progress=False).visual, torch.randn(12 * 22, 1176), (1, 12, 22)
    expected = reference.model.visual(patches, torch.tensor([grid])).pooler_output
    actual = visual(patches, [grid])
    assert (actual - expected).abs().max() < TOLERANCE * expected.std()
    visual.cfg = replace(visual.cfg, rope_theta=1e4)
    assert (visual(patches, [grid]) - expected).abs().max() > 10 * TOLERANCE * expected.std()


def test_text_after_a_long_video_counts_on_from_its_last_second(pair):
    """Published rule; transformers from 5.3 on counts from height and width only, so positions are handed to it."""
    reference, model, processor = pair
    prompt = processor("What happens?", videos=[[picture(56, 56, i) for i in range(24)]], fps=1.0, max_pixels=56 * 56)
    _, positions = model.embed(prompt)
    (visual,) = (prompt.input_ids == model.cfg.video_token_id).nonzero(as_tuple=True)
    first, last = int(visual[0]), int(visual[-1])
    assert positions[:, 0, last].tolist()[0] == first + 11 * 4  # 12 steps, 2 s apart, 2 positions a second
    assert positions[:, 0, last + 1].tolist() == [first + 11 * 4 + 1] * 3
    expected = reference(**reference_inputs(model, prompt), position_ids=positions).logits
    assert (ours(model, prompt) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "steps, seconds, last",
    [(1, 1.0, 0), (4, 1.0, 6), (2, 3.4, 6), pytest.param(2, 3.5, 7, marks=WHOLE_SECONDS), (5, 1.0, 8)],
)
def test_where_positions_stop_being_those_of_transformers(pair, steps, seconds, last):
    """4 x 7 tokens, 2 positions a second: the last time position may be 6, and no longer the greater side, 7."""
    skip_fractions(seconds)
    reference, model, _ = pair
    ids = torch.tensor([1, 2] + [model.cfg.video_token_id] * (steps * 4 * 7) + [3] * 5)
    grids = [(steps, 8, 14)]
    prompt = Prompt(ids, torch.zeros(len(ids), dtype=torch.bool), steps * 28, None, grids, [seconds])
    actual = prompt_positions(ids, model.cfg.image_token_id, model.cfg.video_token_id, grids, [seconds], 2, 2)
    inputs = reference_inputs(model, replace(prompt, patches=torch.empty(steps * 8 * 14, 0)))
    wanted, _ = reference.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], None, inputs["video_grid_thw"], inputs["second_per_grid_ts"]
    )
    after = len(ids) - 5
    assert torch.equal(actual[:, :after], wanted[:, 0, :after])  # up to the video's end they are always equal
    assert actual[0, after - 1] == 2 + last
    assert torch.equal(actual[:, after:], wanted[:, 0, after:]) == (last < 7)
    assert actual[0, after] == 2 + max(7, last + 1) and wanted[0, 0, after] == 2 + 7


def test_a_batch_padded_on_the_right(pair):
    reference, model, processor = pair
    prompts = [processor(**PROMPTS[name]) for name in ("text", "odd image", "several images")]
    longest = max(len(p.input_ids) for p in prompts)
    embedded = [model.embed(p) for p in prompts]
    x = torch.cat([torch.nn.functional.pad(e, (0, 0, 0, longest - e.shape[1])) for e, _ in embedded])
    positions = torch.cat([torch.nn.functional.pad(p, (0, longest - p.shape[2])) for _, p in embedded], dim=1)
    actual = model.logits(model(x, positions))

    inputs = [reference_inputs(model, p) for p in prompts]
    pad = lambda t: torch.nn.functional.pad(t, (0, longest - t.shape[1]))  # noqa: E731
    kinds = [i.get("mm_token_type_ids", torch.zeros_like(i["input_ids"], dtype=torch.int)) for i in inputs]
    expected = reference(
        input_ids=torch.cat([pad(i["input_ids"]) for i in inputs]),
        attention_mask=torch.cat([pad(i["attention_mask"]) for i in inputs]),
        mm_token_type_ids=torch.cat([pad(k) for k in kinds]),
        pixel_values=torch.cat([i["pixel_values"] for i in inputs[1:]]),
        image_grid_thw=torch.cat([i["image_grid_thw"] for i in inputs[1:]]),
    ).logits
    for b, prompt in enumerate(prompts):
        n = len(prompt.input_ids)
        assert (actual[b, :n] - expected[b, :n]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["text", "several images", "video"])
def test_greedy_continuations(pair, name):
    """32 tokens, through our full cache on pages and through the dense one, equal to transformers' generate."""
    reference, model, processor = pair
    prompt = processor(**PROMPTS[name])
    inputs = reference_inputs(model, prompt)
    out = reference.generate(
        **inputs, max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    expected = out[0, len(prompt.input_ids) :].tolist()
    assert len(set(expected)) > 1
    for policy in ("full", "dense"):
        (result,) = Engine(model, HybridConfig(), policy, compile=False).generate([prompt], 32)
        assert result.token_ids == expected


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_text_only_checkpoints(kind, llama, tmp_path):
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    folder = llama
    if kind == "qwen2":
        folder = tmp_path
        sizes = dict(vocab_size=264, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=6)
        qwen2 = Qwen2ForCausalLM(
            Qwen2Config(**sizes, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None)
        )
        for p in qwen2.parameters():
            torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.1)
        qwen2.save_pretrained(folder)
        tiny_vlm.save_processing(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, processor = from_pretrained(folder, progress=False), Processor.from_pretrained(folder)
    prompt = processor("And then?", context="Once upon a time there was a cache.")
    expected = reference(prompt.input_ids[None]).logits
    assert (ours(model, prompt) - expected).abs().max() < TOLERANCE * expected.std()
    out = reference.generate(
        prompt.input_ids[None], max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0
    )
    (result,) = Engine(model, policy="full", compile=False).generate([prompt], 32)
    assert result.token_ids == out[0, len(prompt.input_ids) :].tolist()
