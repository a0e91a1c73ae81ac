"""Makes a small checkpoint in the Qwen2.5-VL format: random weights, byte-level tokenizer, the real special tokens.

Its answers mean nothing. It shows that a folder in the published format goes through every stage, and it gives tests
and benchmarks a model of any shape.

    python -m demo.tiny_vlm FOLDER
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from hybridkv.model.config import parse_config
from hybridkv.model.decoder import Model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
BYTES = 256

CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{%- set pictures = namespace(n=0) %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{ message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{% set pictures.n = pictures.n + 1 %}
{%- if add_vision_id %}{{ 'Picture ' ~ pictures.n ~ ': ' }}{% endif %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else %}{{ part.text }}{% endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def token_id(token: str) -> int:
    return BYTES + SPECIAL.index(token)


def config(
    hidden_size: int = 128,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    vision_layers: int = 2,
    tie: bool = True,
) -> dict:
    """A `config.json` in the published, flat layout."""
    half = head_dim // 2
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {
            "type": "mrope",
            "mrope_section": [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8],
        },
        "max_position_embeddings": 128000,
        "tie_word_embeddings": tie,
        "vocab_size": BYTES + len(SPECIAL),
        "eos_token_id": token_id("<|im_end|>"),
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
        "vision_config": {
            "depth": vision_layers,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 4,
            "in_chans": 3,
            "out_hidden_size": hidden_size,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [vision_layers - 1],
            "tokens_per_second": 2,
            "hidden_act": "silu",
        },
    }


def save_processing(
    folder: Path, vocabulary: Sequence[str] = (), pattern: str = "", template: str = CHAT_TEMPLATE
) -> None:
    """Writes a byte-level tokenizer with Qwen2.5-VL's special tokens and chat format, and an image processor's file.

    Args:
        vocabulary: all tokens in order, special ones last; empty for the bytes alone.
        pattern: regular expression of the pieces that may be one token; empty for bytes alone.
        template: of the chat.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens = vocabulary[: -len(SPECIAL)] or sorted(byte_level.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(tokens)}, merges=[], ignore_merges=True))
    pieces = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*pieces, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    )
    fast.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "Qwen2VLImageProcessor",
                "min_pixels": 3136,
                "max_pixels": 12845056,
                "patch_size": 14,
                "temporal_patch_size": 2,
                "merge_size": 2,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
            },
            indent=2,
        )
    )


def random_model(raw: dict, seed: int = 0) -> Model:
    """A model with normal weights scaled so that activations keep their size from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    model = Model(parse_config(raw)).requires_grad_(False)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.normal_(std=p[0].numel() ** -0.5 if "embed_tokens" not in name else 1.0, generator=generator)
        elif name.endswith("bias"):
            p.normal_(std=0.1, generator=generator)
        else:
            nn.init.ones_(p)
    return model.eval()


def save(folder: Path, raw: dict, seed: int = 0) -> None:
    """Writes the whole checkpoint folder, with the published key layout."""
    folder.mkdir(parents=True, exist_ok=True)
    model = random_model(raw, seed)
    tensors = {}
    for name, value in model.state_dict().items():
        published = name if name.startswith(("visual.", "lm_head.")) else f"model.{name}"
        tensors[published] = value.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    save_processing(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    save(parser.parse_args().folder, config())
