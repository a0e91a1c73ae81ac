"""Ways to break a checkpoint folder by chance, for `tests/fuzz_checkpoints.py`."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hybridkv.model.shards import INDEX, SINGLE

NONSENSE = [
    None, True, False, "", "x", "4", "Infinity", [], [None], [[1]], {}, {"a": 1}, [1, "x"], -1, 0, 3, 7, 1.5, 1e-30,
    float("nan"), float("inf"), -float("inf"), 10**7, 2**31, 2**63, 10**30, 10**400, 1e308, [10**30], [-1, 2], "\ud800",
]  # fmt: skip


def nested(raw: dict, rng: random.Random) -> dict:
    """The layout of transformers 5, or the one between, with both."""
    outer = {k: raw[k] for k in ("model_type", "image_token_id", "video_token_id", "vision_config") if k in raw}
    inner = {k: v for k, v in raw.items() if k not in outer and k not in ("tie_word_embeddings", "architectures")}
    if rng.random() < 0.5:
        rope = {**(inner.pop("rope_scaling", None) or {}), "rope_theta": inner.pop("rope_theta", 1e6)}
        inner["rope_parameters"] = {**rope, "rope_type": "default"}
    where = rng.choice([outer, inner])
    where["tie_word_embeddings"] = raw.get("tie_word_embeddings", False)
    return {**(raw if rng.random() < 0.3 else {}), **outer, "text_config": inner}


def drop_keys(raw: dict, rng: random.Random, share: float) -> None:
    """Leaves keys out at random, also within objects."""
    for key in list(raw):
        if key == "model_type":
            continue
        if isinstance(raw[key], dict) and key != "rope_scaling":
            drop_keys(raw[key], rng, share)
        if rng.random() < share:
            del raw[key]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / SINGLE)


def break_field(folder: Path, rng: random.Random) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    if raw["model_type"] == "qwen2_5_vl" and rng.random() < 0.4:
        raw = nested(raw, rng)
    holders = [raw] + [v for v in raw.values() if isinstance(v, dict)] * 2
    unread = ("architectures", "bos_token_id", "vision_start_token_id", "vision_end_token_id")
    extra = ["quantization_config", "layer_types", "use_sliding_window", "rope_parameters", "rope_scaling", "head_dim"]
    extra += ["num_key_value_heads", "text_config", "vision_config", "dtype", "torch_dtype", "mlp_bias", "hidden_act"]
    extra += ["partial_rotary_factor", "num_attention_heads", "num_hidden_layers", "compression_config"]
    for _ in range(rng.choice([1, 1, 2])):
        holder = rng.choice(holders)
        names = [*holder, *(extra if "hidden_size" in holder else [])]
        holder[rng.choice([name for name in names if name not in unread])] = rng.choice(NONSENSE)
    path.write_text(json.dumps(raw))


def drop_fields(folder: Path, rng: random.Random) -> None:
    raw = json.loads((folder / "config.json").read_text())
    drop_keys(raw, rng, 0.1)
    (folder / "config.json").write_text(json.dumps(raw))


def break_json(folder: Path, rng: random.Random) -> None:
    """The text of a JSON file, by bytes or by what JSON parsers stumble over."""
    path = folder / rng.choice(["config.json", "config.json", "generation_config.json", INDEX])
    if path.name == INDEX:
        write_shards(folder)
    text = path.read_bytes() if path.exists() else b'{"eos_token_id": 5}'
    at = rng.randrange(len(text))
    path.write_bytes(
        rng.choice(
            [
                text[:at],
                text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :],
                text[:at] + text[at + rng.randrange(1, 20) :],
                b"\xff\xfe" + text,
                b"\xef\xbb\xbf" + text,
                b"[" * 100_000,
                b'{"a": ' + b"9" * 5000 + b", " + text[1:],
                b'{"model_type": "llama", ' + text[1:],
                rng.choice([b"[]", b"null", b"", b'"x"', b"NaN", b"{}"]),
            ]
        )
    )


def break_generation(folder: Path, rng: random.Random) -> None:
    said = {"eos_token_id": rng.choice(NONSENSE), "bos_token_id": rng.choice(NONSENSE)}
    (folder / "generation_config.json").write_text(json.dumps(said if rng.random() < 0.9 else rng.choice(NONSENSE)))


def write_shards(folder: Path) -> dict[str, str]:
    tensors = tensors_of(folder)
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: value for name, value in tensors.items() if files[name] == file}, folder / file)
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    return files


def break_index(folder: Path, rng: random.Random) -> None:
    files = write_shards(folder)
    name = rng.choice(sorted(files))
    other = "part-1.safetensors" if files[name] == "part-0.safetensors" else "part-0.safetensors"
    what = rng.randrange(4)
    if what == 0:  # a tensor in two shards
        value = load_file(folder / files[name])[name]
        save_file({**load_file(folder / other), name: value + 1}, folder / other)
    elif what == 1:  # a promise that is not kept
        files["model.more.weight"] = other
    elif what == 2:  # the wrong shard named
        files[name] = other
    else:
        files[name] = rng.choice(
            ["../x.safetensors", "x.bin", "", "/x.safetensors", "a\0.safetensors", 3, None, [other]]
        )
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def break_tensors(folder: Path, rng: random.Random) -> None:
    tensors = tensors_of(folder)
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    changed = rng.choice([
        value[:-1], value[..., :1], value[None], value.to(torch.float8_e4m3fn), value.to(torch.int8), value > 0,
        value.to(torch.float8_e5m2), value.to(torch.int64), value.to(torch.complex64), value[:0], None,
    ])  # fmt: skip
    if changed is None:
        key = rng.choice([name, f"{name}_scale_inv", "lm_head.weight.lora_A", "model.layers.7.norm.weight", "a\nb"])
        if key == name:
            del tensors[name]
        else:
            tensors[key] = torch.ones(2)
    else:
        tensors[name] = changed.contiguous()
    save_file(tensors, folder / SINGLE)


def break_bytes(folder: Path, rng: random.Random) -> None:
    """The weight file's header, or its length."""
    data = bytearray((folder / SINGLE).read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    what = rng.randrange(4)
    if what == 0:
        data = data[: rng.randrange(len(data))]
    elif what == 1:
        data[:8] = rng.choice([0, 1, 2**63, 2**40, header, header - 9]).to_bytes(8, "little")
    elif what == 2:
        data[rng.randrange(header)] = rng.randrange(256)
    else:
        digits = [i for i in range(8, header) if chr(data[i]).isdigit()]
        data[rng.choice(digits)] = ord(rng.choice("0123456789"))
    (folder / SINGLE).write_bytes(data)


def add_adapter(folder: Path, rng: random.Random) -> None:
    if rng.random() < 0.3:
        (folder / "config.json").unlink()
    (folder / rng.choice(["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])).write_text("{}")


BREAKING = [break_field] * 8 + [drop_fields, break_json, break_generation, break_index, break_tensors, break_bytes]
BREAKING += [break_json, break_tensors, break_bytes, add_adapter]
