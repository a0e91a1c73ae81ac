"""What a checkpoint's `config.json` says, in one flat dataclass per tower.

Reads the flat layout of the published Qwen2.5-VL checkpoints, the nested `text_config` layout that transformers 5
writes, and the text-only Qwen2 and Llama layouts. Field names are those of Hugging Face, and so are the defaults of
fields that a file leaves out: transformers does not write every field that equals its default.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from hybridkv.model.fields import CheckpointError, Fields, read_json, show


@dataclass(frozen=True)
class VisionConfig:
    depth: int = 32
    hidden_size: int = 3584
    intermediate_size: int = 3420
    num_heads: int = 16
    out_hidden_size: int = 3584
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112  # pixels
    tokens_per_second: int = 4
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    rope_theta: float = 1e4

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


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DEFAULTS = {  # of transformers' Qwen2_5_VLTextConfig, Qwen2Config and LlamaConfig; None: as many as attention heads
    "qwen2_5_vl": dict(
        zip(SIZES, (152064, 8192, 29568, 80, 64), strict=True),
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        eos_token_id=151645,
    ),
    "qwen2": dict(
        zip(SIZES, (151936, 4096, 22016, 32, 32), strict=True),
        num_key_value_heads=32,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        eos_token_id=None,
    ),
    "llama": dict(
        zip(SIZES, (32000, 4096, 11008, 32, 32), strict=True),
        num_key_value_heads=None,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        eos_token_id=2,
    ),
}


def _rope(part: Fields, kinds: tuple[str, ...], theta: float) -> tuple[float, Fields]:
    """Theta, and the object that holds what else is said on RoPE.

    Before transformers 5 that is rope_theta and rope_scaling; from 5 on both live in rope_parameters.
    """
    old, new = part.section("rope_scaling"), part.section("rope_parameters")
    rope = old if old.raw else new
    kind = rope.raw.get("rope_type", rope.raw.get("type", "default"))
    if kind not in kinds:
        raise rope.error(f"{rope.prefix}rope_type {show(kind)} is not supported, only plain RoPE and M-RoPE")
    for name, value in rope.raw.items():
        if isinstance(value, dict):
            raise rope.error(f"{rope.prefix}{name}: RoPE for each kind of layer is not supported")
    for holder in (rope, part):
        if holder.given("partial_rotary_factor") and holder.raw["partial_rotary_factor"] != 1:
            raise holder.error(f"{holder.prefix}partial_rotary_factor is not supported")
    return rope.number("rope_theta", part.number("rope_theta", theta)), rope


def _refuse_what_is_not_built(part: Fields) -> None:
    """Features that change what a model computes, in the whole config or one of its parts."""
    for name in ("quantization_config", "compression_config"):
        if part.given(name):
            method = part.section(name).raw.get("quant_method", "unknown")
            raise part.error(
                f"{part.prefix}{name}: quantised weights ({show(method)}) are not supported, use a checkpoint in "
                "bfloat16, float16 or float32"
            )
    if part.raw.get("hidden_act", "silu") != "silu":
        raise part.error(f"{part.prefix}hidden_act {show(part.raw['hidden_act'])} is not supported, only 'silu'")
    kinds = part.raw.get("layer_types")
    sliding = part.given("use_sliding_window") and part.flag("use_sliding_window")
    if sliding or (
        kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds))
    ):
        raise part.error(f"{part.prefix}use_sliding_window or layer_types: sliding-window attention is not supported")
    for name in ("rope_scaling", "rope_parameters"):
        part.section(name)  # an object, also where another one is read
    for name in ("per_layer_config", "transformers_weights"):
        if part.given(name):
            raise part.error(f"{part.prefix}{name} is not supported")
    for name in ("dtype", "torch_dtype"):
        if part.raw.get(name) not in (None, "bfloat16", "float16", "float32", "float64"):
            raise part.error(f"{part.prefix}{name} {show(part.raw[name])} is not supported, only bfloat16 and floats")


def _vision(part: Fields) -> VisionConfig:
    _refuse_what_is_not_built(part)
    theta, _ = _rope(part, ("default", "axial"), 1e4)
    sizes = {f.name: part.whole(f.name, f.default) for f in fields(VisionConfig) if f.type is int}
    full = part.wholes("fullatt_block_indexes", VisionConfig.fullatt_block_indexes)
    vision = VisionConfig(**sizes, fullatt_block_indexes=full, rope_theta=theta)
    if vision.in_channels != 3 or part.whole("in_chans", 3) != 3:
        raise part.error(f"{part.prefix}in_channels must be 3, the colours of a picture")
    if vision.hidden_size % (4 * vision.num_heads):
        raise part.error(
            f"{part.said('hidden_size', vision.hidden_size)} must split over "
            f"{part.said('num_heads', vision.num_heads)} into a multiple of 4"
        )
    same = {"head_dim": vision.hidden_size // vision.num_heads, "num_attention_heads": vision.num_heads}
    for name, value in {**same, "num_hidden_layers": vision.depth}.items():
        if part.raw.get(name, value) not in (None, value):
            raise part.error(f"{part.said(name, part.raw[name])} contradicts the other fields, which give {value}")
    if vision.window_size < vision.patch_size * vision.spatial_merge_size:
        raise part.error(f"{part.said('window_size', vision.window_size)} is less than one visual token's pixels")
    return vision


def parse_config(raw: dict, file: str = "config.json") -> Config:
    """The `Config` of a parsed `config.json`; `file` is its name for messages.

    Raises:
        CheckpointError: unknown model type, an unsupported feature, a field of the wrong kind, or sizes that do not
            go together.
    """
    whole = Fields(raw, file)
    model_type = raw.get("model_type")
    if model_type not in list(DEFAULTS):
        raise whole.error(
            f"model_type {show(model_type)} is not supported: use a qwen2_5_vl, qwen2 or llama checkpoint"
        )
    # As in transformers: what a nested file says outside of text_config says nothing about the decoder.
    nested = whole.given("text_config")
    if nested and model_type != "qwen2_5_vl":
        raise whole.error(f"a {model_type} checkpoint with a text_config is not supported")
    text = whole.section("text_config") if nested else whole
    for part in (whole, text) if nested else (whole,):
        _refuse_what_is_not_built(part)
    cfg = _text(text, model_type)
    # A nested file may say these two outside or inside of text_config.
    tied = whole.flag("tie_word_embeddings") or text.flag("tie_word_embeddings")
    stated = [part.tokens("eos_token_id", cfg.vocab_size) for part in (whole, text) if part.given("eos_token_id")]
    default = text.raw.get("eos_token_id", DEFAULTS[model_type]["eos_token_id"])
    eos = stated[0] if stated else () if default is None else (default,)
    cfg = replace(cfg, tie_word_embeddings=tied, eos_token_id=eos)
    if model_type != "qwen2_5_vl":
        return cfg
    part = whole.section("vision_config")
    vision = _vision(part)
    if vision.out_hidden_size != cfg.hidden_size:
        raise whole.error(
            f"{part.said('out_hidden_size', vision.out_hidden_size)} is not "
            f"{text.said('hidden_size', cfg.hidden_size)}: what the vision tower gives must fit the decoder"
        )
    image, video = (
        whole.whole(name, default, 0, cfg.vocab_size - 1)
        for name, default in (("image_token_id", 151655), ("video_token_id", 151656))
    )
    return replace(cfg, image_token_id=image, video_token_id=video, vision=vision)


def _text(text: Fields, model_type: str) -> Config:
    """The decoder's part."""
    defaults = DEFAULTS[model_type]
    sizes = {name: text.whole(name, defaults[name]) for name in (*SIZES, "max_position_embeddings")}
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    kv_heads = text.raw.get("num_key_value_heads", defaults["num_key_value_heads"])
    kv_heads = heads if kv_heads is None else text.whole("num_key_value_heads", kv_heads)
    if heads % kv_heads:
        raise text.error(
            f"{text.said('num_attention_heads', heads)} do not split over {text.said('num_key_value_heads', kv_heads)}"
        )
    if text.given("head_dim"):
        head_dim = text.whole("head_dim", 0)
    elif hidden % heads == 0:
        head_dim = hidden // heads
    else:
        raise text.error(
            f"{text.said('hidden_size', hidden)} does not split over {text.said('num_attention_heads', heads)}"
        )
    if head_dim % 2:
        raise text.error(f"{text.prefix}head_dim {head_dim} is odd: RoPE turns pairs")
    kinds = text.raw.get("layer_types")
    if kinds is not None and len(kinds) != sizes["num_hidden_layers"]:
        raise text.error(
            f"{text.prefix}layer_types holds {len(kinds)} layers, num_hidden_layers is {sizes['num_hidden_layers']}"
        )
    if text.flag("mlp_bias") or (model_type == "llama" and text.flag("attention_bias")):
        raise text.error("a llama checkpoint with biases is not supported")

    vl = model_type == "qwen2_5_vl"
    theta, rope = _rope(text, ("default", "mrope") if vl else ("default",), defaults["rope_theta"])
    section = rope.wholes("mrope_section", (16, 24, 24)) if vl else None
    if vl and (len(section) != 3 or sum(section) * 2 != head_dim):
        raise rope.error(
            f"{rope.said('mrope_section', section)} must be three numbers that sum to head_dim / 2 = {head_dim // 2}"
        )
    return Config(
        **sizes,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=text.number("rms_norm_eps", defaults["rms_norm_eps"], below=1),
        rope_theta=theta,
        mrope_section=section,
        attention_bias=model_type != "llama",
    )


def load_config(folder: Path) -> Config:
    """`config.json` of a checkpoint folder; `generation_config.json` adds the tokens that end an answer.

    Raises:
        CheckpointError: as `parse_config`, or the folder holds an adapter.
    """
    path, generation = folder / "config.json", folder / "generation_config.json"
    if (folder / "adapter_config.json").exists() or any(folder.glob("adapter_model.*")):
        what = "holds an adapter beside a model" if path.exists() else "is an adapter, not a model"
        raise CheckpointError(
            f"{folder} {what}: merge it into its base model first (peft's merge_and_unload) and load what that saves"
        )
    cfg = parse_config(read_json(path), str(path))
    if generation.exists():
        said = Fields(read_json(generation), str(generation))
        if said.given("eos_token_id"):
            return replace(cfg, eos_token_id=said.tokens("eos_token_id", cfg.vocab_size))
    return cfg
