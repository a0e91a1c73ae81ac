"""Checkpoint folders by the thousand: valid ones against transformers, broken ones against one clear error.

    python -m tests.fuzz_checkpoints --cases 2500

Every case copies a tiny checkpoint and changes it by chance. A valid one must give transformers' config, its own
tensors and, every few dozens of cases, transformers' logits. A broken one must raise `CheckpointError` in one line;
a change that proves harmless must leave what transformers reads.
"""

import argparse
import copy
import json
import random
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from demo import tiny_vlm
from hybridkv.model import CheckpointError, Config, VisionConfig, from_pretrained
from hybridkv.model.config import SIZES
from hybridkv.model.shards import INDEX, SINGLE, our_name
from tests.broken_checkpoints import BREAKING, nested, tensors_of

SLOW = 20.0  # seconds; a case takes hundredths
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# ---- the oracle ------------------------------------------------------------------------------------------------------


def reference_config(raw: dict) -> Config:
    """What transformers reads from a parsed `config.json`, in our dataclass."""
    from transformers import CONFIG_MAPPING, GenerationConfig

    theirs = CONFIG_MAPPING[raw["model_type"]](**copy.deepcopy(raw))
    vl = raw["model_type"] == "qwen2_5_vl"
    text = theirs.text_config if vl else theirs
    eos = GenerationConfig.from_model_config(theirs).eos_token_id
    common = {f.name for f in fields(VisionConfig)} - {"rope_theta", "fullatt_block_indexes"}
    return Config(
        **{name: getattr(text, name) for name in (*SIZES, "max_position_embeddings", "rms_norm_eps")},
        num_key_value_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        rope_theta=float(text.rope_parameters["rope_theta"]),
        mrope_section=tuple(text.rope_parameters.get("mrope_section", (16, 24, 24))) if vl else None,
        attention_bias=raw["model_type"] != "llama",
        tie_word_embeddings=theirs.tie_word_embeddings,
        eos_token_id=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        image_token_id=theirs.image_token_id if vl else -1,
        video_token_id=theirs.video_token_id if vl else -1,
        vision=VisionConfig(
            **{name: getattr(theirs.vision_config, name) for name in common},
            fullatt_block_indexes=tuple(theirs.vision_config.fullatt_block_indexes),
            rope_theta=theirs.vision_config.rope_parameters["rope_theta"],
        )
        if vl
        else None,
    )


def reference_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM, Qwen2_5_VLForConditionalGeneration

    vl = json.loads((folder / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    kind = Qwen2_5_VLForConditionalGeneration if vl else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()(ids[None]).logits[0]


# ---- valid folders ---------------------------------------------------------------------------------------------------


def base_config(kind: str, tie: bool) -> dict:
    raw = tiny_vlm.config(hidden_size=64, heads=4, head_dim=16, layers=2, vision_layers=2, tie=tie)
    raw |= {"bos_token_id": None, "intermediate_size": 96}
    del raw["head_dim"]
    if kind == "qwen2_5_vl":
        return raw
    kept = (*SIZES, "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "eos_token_id")
    return {"model_type": kind, "tie_word_embeddings": tie, "bos_token_id": None} | {k: raw[k] for k in kept}


def write(folder: Path, tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    """In one file or in shards, sometimes with an older index beside it."""
    (folder / SINGLE).unlink(missing_ok=True)
    shards = rng.choice([1, 1, 2, 3])
    names = sorted(tensors)
    files = {name: f"model-{rng.randrange(shards) + 1:05d}-of-{shards:05d}.safetensors" for name in names}
    if shards == 1:
        save_file(tensors, folder / SINGLE)
        if rng.random() < 0.3:  # left over: transformers reads the single file
            (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-old.safetensors")}))
        return
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))


def relayout(tensors: dict, rng: random.Random) -> dict:
    """Published keys, or those of transformers 5."""
    if rng.random() < 0.5:
        return tensors
    return {
        f"model.{key}"
        if key.startswith("visual.")
        else key.replace("model.", "model.language_model.", 1)
        if key.startswith("model.")
        else key: value
        for key, value in tensors.items()
    }


def valid_variant(folder: Path, rng: random.Random) -> dict[str, torch.Tensor]:
    """Changes a folder into another valid one; returns the weights it should give, by our names."""
    raw = json.loads((folder / "config.json").read_text())
    tensors = tensors_of(folder)
    dtype = rng.choice(DTYPES)
    tensors = {key: value.to(dtype) for key, value in tensors.items()}
    want = {our_name(key): value for key, value in tensors.items()}
    if raw["tie_word_embeddings"] and rng.random() < 0.5:
        head = tensors["model.embed_tokens.weight"].clone()
        if rng.random() < 0.5:
            head += torch.ones_like(head)
            want["lm_head.weight"] = head
        tensors["lm_head.weight"] = head
        if "lm_head.weight" not in want and rng.random() < 0.3:
            del tensors["model.embed_tokens.weight"]  # the output layer alone is the embedding, too
    if rng.random() < 0.2:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    vl = raw["model_type"] == "qwen2_5_vl"
    write(folder, relayout(tensors, rng) if vl else tensors, rng)
    for key in ("rope_theta", "rms_norm_eps", "max_position_embeddings", "eos_token_id"):
        if rng.random() < 0.3:
            del raw[key]
    if rng.random() < 0.5:
        raw[rng.choice(["dtype", "torch_dtype"])] = str(dtype).removeprefix("torch.")
    if vl:
        vision = raw["vision_config"]
        for key in ("in_chans", "patch_size", "window_size", "spatial_merge_size", "hidden_act", "tokens_per_second"):
            if rng.random() < 0.3:
                del vision[key]
        if rng.random() < 0.2:
            vision["rope_parameters"] = {"rope_type": rng.choice(["axial", "default"]), "rope_theta": 500.0}
        raw = nested(raw, rng) if rng.random() < 0.5 else raw
    (folder / "config.json").write_text(json.dumps(raw))
    return want


# ---- judging ---------------------------------------------------------------------------------------------------------


def weights_are(model: torch.nn.Module, want: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == want.keys() and all(
        torch.equal(value, want[name].to(value.dtype)) for name, value in state.items()
    )


def judge_valid(folder: Path, rng: random.Random, logits: bool) -> str:
    want = valid_variant(folder, rng)
    model = from_pretrained(folder, progress=False)
    raw = json.loads((folder / "config.json").read_text())
    untied = {"tie_word_embeddings": False} if "lm_head.weight" in want else {}
    if model.cfg != Config(**{**vars(reference_config(raw)), **untied}):
        return "wrong config"
    if not weights_are(model, want):
        return "wrong weights"
    if not logits:
        return "valid"
    model = from_pretrained(folder, torch.float32, progress=False)
    ids = torch.tensor([rng.randrange(256) for _ in range(12)])
    positions = torch.arange(12).expand(3, 1, -1)
    ours, theirs = model.logits(model(model.embed_tokens(ids)[None], positions))[0], reference_logits(folder, ids)
    return "valid, logits" if (ours - theirs).abs().max() < 1e-4 * theirs.std() + 1e-5 else "wrong logits"


def judge_broken(folder: Path, rng: random.Random) -> str:
    """Either refused in one line, or what transformers and safetensors read."""
    breaking = rng.choice(BREAKING)
    breaking(folder, rng)
    try:
        model = from_pretrained(folder, progress=False)
    except CheckpointError as e:
        text = str(e)
        return "refused" if len(text.splitlines()) == 1 and 20 < len(text) < 700 else f"unclear: {text[:300]!r}"
    generation = folder / "generation_config.json"
    eos = json.loads(generation.read_text()).get("eos_token_id") if generation.exists() else None
    raw = json.loads((folder / "config.json").read_text())
    try:
        wanted = vars(reference_config(raw))
    except Exception as e:  # whatever transformers stumbles over: that folder had to be refused
        return f"accepted alone: {type(e).__name__} {str(e)[-200:]!r}"
    if eos is not None:
        wanted["eos_token_id"] = tuple(eos) if isinstance(eos, list) else (eos,)
    files = [folder / SINGLE] if (folder / SINGLE).exists() else sorted(folder.glob("*.safetensors"))
    stored = {our_name(key): value for file in files for key, value in load_file(file).items()}
    if "lm_head.weight" in stored:  # untied weights under a config that ties them: both are kept
        wanted["tie_word_embeddings"] = False
    if vars(model.cfg) != wanted:
        return f"wrong config: {[k for k, v in vars(model.cfg).items() if v != wanted[k]]}"
    return "harmless" if weights_are(model, stored) else "wrong weights"


def fuzz(cases: int, seed: int = 0, logits_every: int = 20) -> dict:
    """Counts of what came out; `failures` lists what must not happen."""
    counts: Counter = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        bases = {}
        for kind in ("qwen2_5_vl", "qwen2", "llama"):
            for tie in (False, True):
                bases[kind, tie] = Path(root) / f"{kind}-{tie}"
                save_weights(bases[kind, tie], base_config(kind, tie))
        for case in range(cases):
            rng = random.Random(f"{seed}-{case}")
            kind, tie = rng.choice(["qwen2_5_vl"] * 3 + ["qwen2", "llama"]), rng.random() < 0.5
            with tempfile.TemporaryDirectory(dir=root) as folder:
                for file in bases[kind, tie].iterdir():
                    (Path(folder) / file.name).write_bytes(file.read_bytes())
                begin = time.perf_counter()
                try:
                    valid = case % 5 < 2
                    logits = case % (5 * logits_every) == 0
                    judge = judge_valid(Path(folder), rng, logits) if valid else judge_broken(Path(folder), rng)
                except Exception as e:  # any other exception is what is looked for
                    judge = f"traceback: {type(e).__name__}: {str(e)[:300]}"
                if time.perf_counter() - begin > SLOW:
                    judge = f"hang: {judge}"
            outcome = judge.partition(":")[0]
            counts[outcome] += 1
            if outcome not in ("valid", "valid, logits", "refused", "harmless"):
                failures.append(f"case {case}: {judge}")
    return {"cases": cases, **counts, "failures": failures}


def save_weights(folder: Path, raw: dict) -> None:
    """A checkpoint folder without tokenizer, published layout."""
    folder.mkdir()
    model = tiny_vlm.random_model(raw)
    tensors = {
        name if name.startswith(("visual.", "lm_head.")) else f"model.{name}": value.contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = fuzz(args.cases, args.seed)
    for failure in result.pop("failures"):
        print(failure)
    print(json.dumps(result))
