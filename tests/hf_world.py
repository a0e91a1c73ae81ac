"""Tiny random models of transformers, one of each architecture that is tested, and prompts for them.

Random models must not hide mistakes: weights are large enough that answers change from token to token and hang on the
whole prompt, logits are of about unit size, and pictures go through the vision towers.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor

VOCAB, IMAGE, VIDEO, START, END = 200, 190, 191, 192, 193
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
HEAD = dict(head_dim=16)
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
TOKENS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
NEW = 24  # tokens that are generated


def sharpen(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """Weights with which attention is sharp; the output is scaled to logits of unit size by `built`."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            wide = p[0].numel()
            torch.nn.init.normal_(p, std=1.0 if "embed_tokens" in name else 1.5 * wide**-0.5)
        else:
            torch.nn.init.normal_(p, mean=float("norm" in name and "bias" not in name), std=0.4)
    return model.eval()


def text_ids(tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(1, 180, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def with_pictures(*parts: int | list[int]) -> Tensor:
    """Ids (1, T): a number is so many tokens of text, a list is what it says."""
    ids = []
    for n, part in enumerate(parts):
        ids += text_ids(part, seed=n)[0].tolist() if isinstance(part, int) else part
    return torch.tensor([ids])


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text_model(kind: str, **more) -> tuple[hf.PreTrainedModel, dict]:
    text = "Text" if kind == "Gemma3" else ""
    config = getattr(hf, f"{kind}{text}Config")(**(TEXT | more))
    return getattr(hf, f"{kind}ForCausalLM")(config), {"input_ids": text_ids(300)}


def qwen_vl(kind: str) -> tuple[hf.PreTrainedModel, dict]:
    """One picture of 16 x 14 tokens, one of 4 x 6, a clip of 2 x 4 x 4; sizes are in patches, two a token's side."""
    third = kind == "Qwen3VL"
    vision = dict(depth=2, hidden_size=32, num_heads=2, intermediate_size=32, in_channels=3, patch_size=14)
    if kind == "Qwen2VL":
        vision = dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=1, patch_size=14)
    elif kind == "Qwen2_5_VL":
        vision |= dict(out_hidden_size=64, window_size=56, fullatt_block_indexes=[1])
    else:
        vision |= dict(out_hidden_size=64, num_position_embeddings=64, deepstack_visual_indexes=[0])
    text = TEXT | HEAD | {"rope_parameters": MROPE | {"mrope_interleaved": True} if third else MROPE}
    if not third:
        text = TEXT | {"rope_parameters": MROPE}
    config = getattr(hf, f"{kind}Config")(text_config=text, vision_config=vision, **TOKENS, tie_word_embeddings=False)
    model = getattr(hf, f"{kind}ForConditionalGeneration")(config)
    clip = [START, *[VIDEO] * 16, END]
    clip = [*clip, 5, 6, *clip] if third else [START, *[VIDEO] * 32, END]
    ids = with_pictures(5, [START, *[IMAGE] * 224, END], 9, [START, *[IMAGE] * 24, END], 4, clip, 40)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
        "pixel_values": picture(896 + 96, 3 * 2 * 14**2),
        "image_grid_thw": torch.tensor([[1, 32, 28], [1, 8, 12]]),
        "pixel_values_videos": picture(128, 3 * 2 * 14**2, seed=1),
        "video_grid_thw": torch.tensor([[2, 8, 8]]),
    }
    if kind == "Qwen2_5_VL":
        inputs["second_per_grid_ts"] = torch.tensor([0.5])
    return model, inputs


SIGLIP = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8)


def llava_onevision() -> tuple[hf.PreTrainedModel, dict]:
    """A picture of 128 x 128 pixels in tiles of 64: 8 x 8 tokens, then 16 x 16 and a newline for each line."""
    config = hf.LlavaOnevisionConfig(
        text_config=hf.Qwen2Config(**TEXT),
        vision_config=hf.SiglipVisionConfig(**SIGLIP, image_size=64, vision_use_head=False),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[128, 128]],
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    ids = with_pictures(6, [IMAGE] * (64 + 16 * 17), 40)
    inputs = {"pixel_values": picture(1, 5, 3, 64, 64), "image_sizes": torch.tensor([[128, 128]])}
    return hf.LlavaOnevisionForConditionalGeneration(config), {"input_ids": ids} | inputs


def internvl() -> tuple[hf.PreTrainedModel, dict]:
    """Two tiles of 8 x 8 tokens in one run, and another picture of one tile."""
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = hf.InternVLConfig(
        text_config=hf.Qwen2Config(**TEXT),
        vision_config=hf.InternVLVisionConfig(**vision, image_size=[128, 128], patch_size=[8, 8]),
        image_token_id=IMAGE,
        image_seq_length=64,
        tie_word_embeddings=False,
    )
    ids = with_pictures(6, [IMAGE] * 128, 7, [IMAGE] * 64, 30)
    return hf.InternVLForConditionalGeneration(config), {"input_ids": ids, "pixel_values": picture(3, 3, 128, 128)}


def smolvlm(kind: str) -> tuple[hf.PreTrainedModel, dict]:
    """Three tiles of 8 x 8 tokens, text between them."""
    config = getattr(hf, f"{kind}Config")(
        text_config=hf.LlamaConfig(**TEXT),
        vision_config=SIGLIP | {"image_size": 128},
        image_token_id=IMAGE,
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    ids = with_pictures(5, [IMAGE] * 64, 3, [IMAGE] * 64, 3, [IMAGE] * 64, 30)
    model = getattr(hf, f"{kind}ForConditionalGeneration")(config)
    return model, {"input_ids": ids, "pixel_values": picture(1, 3, 3, 128, 128)}


GEMMA3 = HEAD | dict(num_hidden_layers=3, sliding_window=24, query_pre_attn_scalar=20)
GEMMA3 |= dict(layer_types=["sliding_attention", "full_attention", "full_attention"])


def gemma3() -> tuple[hf.PreTrainedModel, dict]:
    """Three pictures of 8 x 8 tokens."""
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**(TEXT | GEMMA3)),
        vision_config=hf.SiglipVisionConfig(**SIGLIP, image_size=128, vision_use_head=False),
        mm_tokens_per_image=64,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    ids = with_pictures(8, [IMAGE] * 64, 4, [IMAGE] * 64, 4, [IMAGE] * 64, 22)
    kinds = {"token_type_ids": (ids == IMAGE).int(), "pixel_values": picture(3, 3, 128, 128)}
    return hf.Gemma3ForConditionalGeneration(config), {"input_ids": ids} | kinds


MODELS: dict[str, Callable[[], tuple[hf.PreTrainedModel, dict]]] = {
    "Qwen2.5-VL": lambda: qwen_vl("Qwen2_5_VL"),
    "Qwen2-VL": lambda: qwen_vl("Qwen2VL"),
    "Qwen3-VL": lambda: qwen_vl("Qwen3VL"),
    "LLaVA-OneVision": llava_onevision,
    "InternVL": internvl,
    "SmolVLM": lambda: smolvlm("SmolVLM"),
    "Idefics3": lambda: smolvlm("Idefics3"),
    "Gemma 3": gemma3,
    "Gemma 3 text": lambda: text_model("Gemma3", **GEMMA3),
    "Qwen2.5": lambda: text_model("Qwen2"),
    "Qwen3": lambda: text_model("Qwen3", **HEAD),
    "Llama": lambda: text_model("Llama"),
    "Mistral": lambda: text_model("Mistral", sliding_window=None),
    "Granite": lambda: text_model("Granite", attention_multiplier=0.3, logits_scaling=1.0),
    "Phi-3": lambda: text_model("Phi3"),
    "OLMo 2": lambda: text_model("Olmo2"),
    "GLM-4": lambda: text_model("Glm4", **HEAD),
}


@dataclass(frozen=True)
class World:
    """A model and a prompt, and what it writes with a `DynamicCache`.

    Attributes:
        tokens: (B, NEW). logits: (NEW, B, V), of unit size.
    """

    model: hf.PreTrainedModel
    inputs: dict
    tokens: Tensor
    logits: Tensor


def run(model: hf.PreTrainedModel, inputs: dict, cache: hf.Cache, new: int = NEW, **more) -> tuple[Tensor, Tensor]:
    """Tokens (B, new) and logits (new, B, V) of a greedy answer."""
    how = dict(max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True) | more
    out = model.generate(**inputs, past_key_values=cache, **how)
    return out.sequences[:, -len(out.logits) :], torch.stack(out.logits)


def built(name: str) -> World:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    sharpen(model).set_attn_implementation("sdpa")
    _, logits = run(model, inputs, hf.DynamicCache(config=model.config), new=2)
    model.get_output_embeddings().weight.data /= logits.std()
    tokens, logits = run(model, inputs, hf.DynamicCache(config=model.config))
    model.set_attn_implementation("hybridkv")
    return World(model, inputs, tokens, logits)


def main() -> None:
    """Prints the table of docs/huggingface.md: `python -m tests.hf_world`."""
    from hybridkv.hf import HybridKVCache

    print(f"transformers {hf.__version__}, torch {torch.__version__}")
    print("| model | largest difference of a logit | layers ours |\n|---|---|---|")
    for name in MODELS:
        its = built(name)
        kv = HybridKVCache(its.model, its.inputs, budget=1.0, max_new_tokens=NEW)
        tokens, logits = run(its.model, its.inputs, kv)
        difference = (logits - its.logits).abs().max()
        answer = "" if torch.equal(tokens, its.tokens) else " (another answer)"
        print(f"| {name} | {difference:.1e}{answer} | {kv.n_layers} of {len(kv.layers)} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        main()
