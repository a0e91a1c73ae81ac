"""`config.json`: every layout and every left-out field as transformers reads it, every wrong value refused by name."""

import copy
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from demo import tiny_vlm
from hybridkv.model import CheckpointError
from hybridkv.model.config import load_config, parse_config
from tests.broken_checkpoints import drop_keys
from tests.fuzz_checkpoints import reference_config

FIELD = Path(__file__).parent / "field"


def read(name: str) -> dict:
    return json.loads((FIELD / f"config-{name}.json").read_text())


def published_7b() -> dict:
    """The published 7B says the same as the 3B, but for these."""
    raw = read("published_3b")
    raw |= dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28)
    raw |= dict(num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False)
    raw["vision_config"]["out_hidden_size"] = 3584
    return raw


@pytest.mark.parametrize("name", ["published_3b", "4.49.0_3b", "4.53.3_7b", "5.23.0_3b"])
def test_files_that_versions_of_transformers_wrote(name):
    """All say what the published file says, also the one that leaves most of vision_config out."""
    cfg = parse_config(read(name))
    assert cfg == parse_config(published_7b() if name.endswith("7b") else read("published_3b"))
    assert cfg == reference_config(read(name))
    assert cfg.rope_theta == 1e6 and cfg.vision.depth == 32 and cfg.vision.tokens_per_second == 2


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen2", "llama"])
def test_an_empty_config_has_the_defaults_of_transformers(kind):
    raw = {"model_type": kind}
    if kind == "qwen2_5_vl":  # the default towers do not fit each other
        raw |= {"vision_config": {"out_hidden_size": 8192}}
    assert parse_config(raw) == reference_config(raw)


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated")
def test_fields_left_out_at_random_are_those_of_transformers():
    names = ["published_3b", "4.49.0_3b", "4.53.3_7b", "5.23.0_3b"]
    equal = 0
    for case in range(300):
        rng = random.Random(case)
        raw = read(rng.choice(names))
        if rng.random() < 0.3:
            raw = {k: v for k, v in raw.items() if k != "vision_config"}
            raw["model_type"] = rng.choice(["qwen2", "llama"])
            raw.pop("text_config", None)
            raw.pop("rope_scaling", None)
        drop_keys(raw, rng, rng.choice([0.05, 0.2]))
        try:
            cfg = parse_config(raw)
        except CheckpointError as e:  # sizes that no longer go together, because a default took one's place
            assert re.search(r"as the file lacks|layer_types holds|sum to head_dim|id from 0 to 31999", str(e)), str(e)
            continue
        assert cfg == reference_config(raw)
        equal += 1
    assert equal > 100


@pytest.mark.parametrize("order", ["old first", "only new"])
def test_rope_scaling_goes_before_rope_parameters(order):
    raw = tiny_vlm.config() | {"rope_parameters": {"rope_theta": 123.0, "mrope_section": [4, 6, 6]}}
    if order == "only new":
        raw["rope_scaling"] = None
    del raw["head_dim"]
    cfg = parse_config(raw)
    assert cfg == reference_config(raw)
    assert cfg.rope_theta == (1e6 if order == "old first" else 123.0)


def test_the_nested_config_of_transformers_5_says_the_same_as_the_flat_one(tmp_path):
    from transformers import Qwen2_5_VLConfig

    flat = tiny_vlm.config(head_dim=16, hidden_size=64) | {"bos_token_id": None}
    flat.pop("head_dim")
    Qwen2_5_VLConfig(**{k: v for k, v in flat.items() if k != "architectures"}).save_pretrained(tmp_path)
    nested = json.loads((tmp_path / "config.json").read_text())
    assert "text_config" in nested and "rope_theta" not in nested
    assert parse_config(nested) == parse_config(flat)


def test_generation_config_names_the_end_tokens(tmp_path):
    raw = tiny_vlm.config()
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for said, tokens in (([5, 7], (5, 7)), (5, (5,)), (None, (raw["eos_token_id"],))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
        assert load_config(tmp_path) == replace(parse_config(raw), eos_token_id=tokens)


BAD_TOKENS = ["x", [None], -1, 264, [3, 264], [[3]], True, 1.0, {}, "3"]
SIZE = ["4", -1, 0, 1.5, None, True, float("nan"), float("inf"), 2**31, 10**400, [], [4], {}]
REAL = ["1", -1.0, 0, None, True, float("nan"), float("inf"), 10**400, []]
WRONG = {
    **{f"{part}{name}": SIZE for part in ("", "text_config.") for name in ("vocab_size", "num_hidden_layers")},
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings"), SIZE),
    **{
        f"vision_config.{name}": SIZE for name in ("depth", "patch_size", "num_heads", "window_size", "out_hidden_size")
    },
    "vision_config.tokens_per_second": [*SIZE, 2.5],
    "vision_config.temporal_patch_size": [*SIZE, [2]],
    "vision_config.fullatt_block_indexes": ["x", 7, None, [-1], [1.0], ["1"], [True], [[1]], {}],
    "vision_config.head_dim": [8, "x"],
    "vision_config.in_channels": [1, 4],
    "vision_config.hidden_size": [*SIZE, 62, 65],
    "num_key_value_heads": [0, 3, "2", 8],
    "head_dim": [0, 31, "32", 33],
    "rms_norm_eps": [*REAL, 1.0],
    "rope_theta": REAL,
    "tie_word_embeddings": ["false", 0, 1, None, []],
    "use_sliding_window": ["false", True, 0, 1],
    "layer_types": ["full_attention", ["full_attention"], ["sliding_attention"] * 4, [None] * 4, 3],
    "eos_token_id": BAD_TOKENS,
    "text_config.eos_token_id": BAD_TOKENS,
    "image_token_id": [*BAD_TOKENS, None],
    "video_token_id": [*BAD_TOKENS, None],
    "rope_scaling": ["mrope", 1, [1], True, {"type": "yarn"}, {"type": None}, {"type": []}, {"full_attention": {}}],
    "rope_parameters": ["mrope", 1, [1], True],
    "rope_scaling.mrope_section": ["x", None, [], [8, 8], [16.0, 0, 0], [-4, 10, 10], [4, 6, 7], {}, 16],
    "rope_scaling.rope_theta": REAL,
    "rope_scaling.partial_rotary_factor": [0.5, "x"],
    "text_config": ["x", [], 1, True],
    "vision_config": ["x", [], 1, True],
    "vision_config.rope_parameters": ["x", {"rope_type": "mrope"}, {"rope_theta": 0}],
    "dtype": ["float8_e4m3fn", "int8", "nonsense", 16, "\ud800", ["float32"]],
    "torch_dtype": ["float4", {}],
    "vision_config.dtype": ["int4"],
    "hidden_act": ["gelu", None, []],
    "vision_config.hidden_act": ["quick_gelu"],
    "model_type": [None, [], {}, "qwen2_5_vl_text"],
    "per_layer_config": [{"0": {}}],
    "transformers_weights": ["other.safetensors"],
    "quantization_config": [{"quant_method": m} for m in ("fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors")],
    "text_config.quantization_config": [{"quant_method": "fp8"}, {}, "fp8"],
    "compression_config": [{"quant_method": "compressed-tensors"}],
}


@pytest.mark.parametrize("path", WRONG)
def test_a_wrong_value_is_refused_by_its_name(path, tmp_path):
    *outer, name = path.split(".")
    for value in WRONG[path]:
        raw = copy.deepcopy(tiny_vlm.config())
        if outer == ["text_config"]:
            raw["text_config"] = {k: v for k, v in raw.items() if not k.endswith("_config")}
        holder = raw[outer[0]] if outer else raw
        holder[name] = value
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with pytest.raises(CheckpointError, match=name) as error:
            load_config(tmp_path)
        message = str(error.value)
        assert "config.json" in message and len(message.splitlines()) == 1 and len(message) < 400 + len(str(tmp_path))
        if "quantization" in name and value and isinstance(value, dict):
            assert f"quantised weights ('{value['quant_method']}')" in message


def test_a_tower_that_does_not_fit_the_decoder():
    raw = tiny_vlm.config()
    raw["vision_config"]["out_hidden_size"] = 64
    with pytest.raises(CheckpointError, match="out_hidden_size 64 is not hidden_size 128"):
        parse_config(raw)


def test_a_place_holder_token_whose_default_is_beyond_the_vocabulary():
    raw = tiny_vlm.config()
    del raw["image_token_id"]
    with pytest.raises(CheckpointError, match=r"image_token_id 151655 \(the default, as the file lacks"):
        parse_config(raw)
    assert parse_config(raw | {"vocab_size": 152064}).image_token_id == 151655


@pytest.mark.parametrize(
    "text, message",
    [
        (b"\xff\xfe{}", "can't be read as JSON"),
        (b"\xef\xbb\xbf{}", "can't be read as JSON"),
        (b"[" * 100_000, "nested too deeply|can't be read as JSON"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "can't be read as JSON"),
        (b'{"model_type": "llama", "model_type": "qwen2"}', "'model_type' is given twice"),
        (b"", "can't be read as JSON"),
        (b"NaN", "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
    ],
    ids=["utf-16", "byte order mark", "deep list", "deep object", "huge number", "twice", "empty", "nan", "null"],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_that_is_no_json_object(name, text, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_vlm.config()))
    (tmp_path / name).write_bytes(text)
    with pytest.raises(CheckpointError, match=message) as error:
        load_config(tmp_path)
    assert str(tmp_path / name) in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("eos", BAD_TOKENS, ids=repr)
def test_generation_config_with_wrong_end_tokens(eos, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_vlm.config()))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id"):
        load_config(tmp_path)
