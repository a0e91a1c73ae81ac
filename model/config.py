"""What a checkpoint's `config.json` says, in one flat dataclass per tower.

Reads the flat layout of the published Qwen2.5-VL checkpoints, the nested `text_config` layout that transformers 5
writes, and the text-only Qwen2 and Llama layouts. Field names are those of Hugging Face.
"""

import json
from dataclasses import dataclass
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint folder that can't be used; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112  # pixels
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    tokens_per_second: float = 2

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    mrope_section: tuple[int, int, int] | None = None  # None: plain one-dimensional RoPE
    attention_bias: bool = False  # on q, k, v; the output projection never has one
    tie_word_embeddings: bool = False
    eos_token_id: tuple[int, ...] = ()
    image_token_id: int = -1
    video_token_id: int = -1
    vision: VisionConfig | None = None


def _vision(raw: dict, hidden_size: int) -> VisionConfig:
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"vision hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
    heads = raw["num_heads"]
    if raw["hidden_size"] % heads or raw["hidden_size"] // heads % 4:
        raise CheckpointError(
            f"vision hidden_size {raw['hidden_size']} must split over {heads} heads into a multiple of 4"
        )
    return VisionConfig(
        depth=raw["depth"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_heads=heads,
        out_hidden_size=raw.get("out_hidden_size", hidden_size),
        in_channels=raw.get("in_channels", raw.get("in_chans", 3)),
        patch_size=raw.get("patch_size", 14),
        temporal_patch_size=raw.get("temporal_patch_size", 2),
        spatial_merge_size=raw.get("spatial_merge_size", 2),
        window_size=raw.get("window_size", 112),
        fullatt_block_indexes=tuple(raw.get("fullatt_block_indexes", (7, 15, 23, 31))),
        tokens_per_second=raw.get("tokens_per_second", 2),
    )


def parse_config(raw: dict) -> Config:
    """The `Config` of a parsed `config.json`.

    Raises:
        CheckpointError: unknown model type, an unsupported feature, or a missing field.
    """
    model_type = raw.get("model_type")
    if model_type not in ("qwen2_5_vl", "qwen2", "llama"):
        raise CheckpointError(
            f"model_type {model_type!r} is not supported: use a qwen2_5_vl, qwen2 or llama checkpoint"
        )
    text = {**raw, **(raw.get("text_config") or {})}
    try:
        return _parse(raw, text, model_type)
    except KeyError as e:
        raise CheckpointError(f"config.json lacks {e.args[0]!r}") from e
    except (TypeError, ZeroDivisionError) as e:
        raise CheckpointError(f"config.json has a field of the wrong kind: {e}") from e


def _parse(raw: dict, text: dict, model_type: str) -> Config:
    heads = text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    if heads % kv_heads:
        raise CheckpointError(f"{heads} attention heads do not split over {kv_heads} key-value heads")
    if text.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act {text['hidden_act']!r} is not supported, only 'silu'")
    if text.get("use_sliding_window"):
        raise CheckpointError("sliding-window attention is not supported")
    if text.get("mlp_bias") or (model_type == "llama" and text.get("attention_bias")):
        raise CheckpointError("a llama checkpoint with biases is not supported")

    # Before transformers 5: rope_theta and rope_scaling; from 5 on both live in rope_parameters.
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise CheckpointError(f"rope_type {rope_type!r} is not supported, only plain RoPE and M-RoPE")
    section = None
    if model_type == "qwen2_5_vl":
        section = tuple(rope.get("mrope_section", (16, 24, 24)))
        if len(section) != 3 or sum(section) * 2 != head_dim:
            raise CheckpointError(
                f"mrope_section {section} must be three numbers that sum to head_dim / 2 = {head_dim // 2}"
            )
    eos = text.get("eos_token_id")
    return Config(
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_hidden_layers=text["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=text.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or 1e4),
        max_position_embeddings=text.get("max_position_embeddings", 32768),
        mrope_section=section,
        attention_bias=model_type != "llama",
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        eos_token_id=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        image_token_id=raw.get("image_token_id", -1),
        video_token_id=raw.get("video_token_id", -1),
        vision=_vision(raw["vision_config"], text["hidden_size"]) if model_type == "qwen2_5_vl" else None,
    )


def read_json(path: Path) -> dict:
    """The JSON object in `path`, or a `CheckpointError` that names the file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise CheckpointError(f"{path} does not exist") from e
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as e:
        raise CheckpointError(f"{path} can't be read as JSON: {e}") from e
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return raw


def load_config(folder: Path) -> Config:
    """`config.json` of a checkpoint folder; `generation_config.json` adds the tokens that end an answer."""
    raw = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.is_file():
        eos = read_json(generation).get("eos_token_id")
        if eos is not None:
            raw = (
                {**raw, "eos_token_id": eos, "text_config": {**raw["text_config"], "eos_token_id": eos}}
                if raw.get("text_config")
                else {**raw, "eos_token_id": eos}
            )
    return parse_config(raw)
