"""transformers' own decoder as a contender: compiled on its `StaticCache`, and eagerly on its `DynamicCache`."""

from collections.abc import Callable

import torch
from torch import Tensor

from hybridkv.model.decoder import Model
from hybridkv.planning.prefill import Prefill


def twin(model: Model):
    """transformers' model on the same weight tensors: Qwen2 where q, k and v have biases, else Llama.

    Text after a prompt stands at one position in all three M-RoPE sections, where M-RoPE is plain RoPE, so this is a
    decoding step of Qwen2.5-VL, too.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    cfg = model.cfg
    kind, config = (Qwen2ForCausalLM, Qwen2Config) if cfg.attention_bias else (LlamaForCausalLM, LlamaConfig)
    config = config(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        rms_norm_eps=cfg.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        max_position_embeddings=cfg.max_position_embeddings,
        tie_word_embeddings=cfg.tie_word_embeddings,
        attn_implementation="sdpa",
        dtype=model.dtype,
    )
    with torch.device("meta"):
        theirs = kind(config)
    ours = {name: t for name, t in model.state_dict().items() if not name.startswith("visual.")}
    renamed = {name if name.startswith("lm_head.") else f"model.{name}": t for name, t in ours.items()}
    if cfg.tie_word_embeddings:
        renamed["lm_head.weight"] = renamed["model.embed_tokens.weight"]
    theirs.load_state_dict(renamed, assign=True)
    rotary = theirs.model.rotary_emb
    theirs.model.rotary_emb = type(rotary)(config=config).to(model.device)  # its buffers are in no checkpoint
    return theirs.requires_grad_(False).eval()


def decoder(model: Model, prefills: list[Prefill], new_tokens: int, compiled: bool) -> Callable[[], Tensor]:
    """A function that takes one greedy step, (B,) tokens; the first step continues with token 0.

    Args:
        prefills: records of B prompts of one length, whose keys and values are copied.
        new_tokens: room for so many.
        compiled: on a StaticCache under `torch.compile`, else eagerly on a DynamicCache.
    """
    from transformers import DynamicCache, StaticCache

    theirs, tokens = twin(model), len(prefills[0].prunable)
    cache = StaticCache(theirs.config, tokens + new_tokens) if compiled else DynamicCache(config=theirs.config)
    for i in range(model.cfg.num_hidden_layers):
        k, v = (torch.stack([getattr(p.layers[i], name) for p in prefills]) for name in ("k", "v"))
        cache.update(k, v, i)

    def step(token: Tensor) -> Tensor:
        logits = theirs(input_ids=token[:, None], past_key_values=cache, use_cache=True).logits
        return logits[:, -1].argmax(-1)

    if compiled:
        mode = "reduce-overhead" if model.device.type == "cuda" else None
        step = torch.compile(step, fullgraph=True, dynamic=False, mode=mode)
    state = {"token": torch.zeros(len(prefills), dtype=torch.int64, device=model.device)}

    @torch.no_grad()
    def take() -> Tensor:
        state["token"] = step(state["token"]).clone()  # a graph's output is overwritten by its next run
        return state["token"]

    return take
