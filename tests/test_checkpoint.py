"""Loading: layouts, dtypes, shards, and a clear error for everything that can be wrong with a folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo import tiny_vlm
from hybridkv.model import CheckpointError, from_pretrained
from hybridkv.model.config import load_config, parse_config
from hybridkv.model.shards import INDEX, SINGLE, our_name


@pytest.fixture
def folder(vlm: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(vlm, tmp_path / "copy")


def edit(path: Path, **changes) -> None:
    raw = json.loads(path.read_text())
    raw.update(changes)
    path.write_text(json.dumps(raw))


def shard(folder: Path, index_names: dict[str, str] | None = None) -> None:
    """Splits the one weight file into two and writes the index."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    files = {n: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file)
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {**files, **(index_names or {})}}))


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_shards_load_like_a_single_file(vlm, folder):
    shard(folder)
    assert same(from_pretrained(folder, progress=False), from_pretrained(vlm, progress=False))


def test_the_key_layout_of_transformers_5(vlm, folder):
    tensors = load_file(folder / SINGLE)
    renamed = {}
    for name, value in tensors.items():
        if name.startswith("visual."):
            renamed[f"model.{name}"] = value
        elif name.startswith("model."):
            renamed["model.language_model." + name.removeprefix("model.")] = value
        else:
            renamed[name] = value
    save_file(renamed, folder / SINGLE)
    assert same(from_pretrained(folder, progress=False), from_pretrained(vlm, progress=False))
    assert our_name("model.language_model.layers.0.mlp.up_proj.weight") == "layers.0.mlp.up_proj.weight"
    assert our_name("model.visual.blocks.1.attn.qkv.bias") == "visual.blocks.1.attn.qkv.bias"


def test_the_nested_config_of_transformers_5_says_the_same_as_the_flat_one(tmp_path):
    from transformers import Qwen2_5_VLConfig

    flat = tiny_vlm.config(head_dim=16, hidden_size=64) | {"bos_token_id": None}
    flat.pop("head_dim")
    Qwen2_5_VLConfig(**{k: v for k, v in flat.items() if k != "architectures"}).save_pretrained(tmp_path)
    nested = json.loads((tmp_path / "config.json").read_text())
    assert "text_config" in nested and "rope_theta" not in nested
    assert parse_config(nested) == parse_config(flat)


def test_dtype_and_device(folder):
    assert {p.dtype for p in from_pretrained(folder, torch.bfloat16, "cpu").parameters()} == {torch.bfloat16}
    assert not any(p.is_meta or p.requires_grad for p in from_pretrained(folder, progress=False).parameters())


def test_generation_config_names_the_end_tokens(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert load_config(folder).eos_token_id == (5, 7)


def test_weights_arrive_one_at_a_time(folder, monkeypatch):
    """The peak is the model and its largest tensor: no more than one loaded tensor is alive beside the parameters."""
    import hybridkv.model.checkpoint as checkpoint

    alive = []
    original = checkpoint._set

    def counting(model, name, value):
        alive.append(sum(p.is_meta for p in model.parameters()))
        original(model, name, value)

    monkeypatch.setattr(checkpoint, "_set", counting)
    from_pretrained(folder, progress=False)
    assert alive == list(range(len(alive), 0, -1))


BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "can't be read as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "missing field": (lambda f: edit_out(f, "hidden_size"), "lacks 'hidden_size'"),
    "unknown model": (lambda f: edit(f / "config.json", model_type="gpt2"), "model_type 'gpt2' is not supported"),
    "unknown activation": (lambda f: edit(f / "config.json", hidden_act="relu"), "hidden_act 'relu'"),
    "sliding window": (lambda f: edit(f / "config.json", use_sliding_window=True), "sliding-window"),
    "heads": (lambda f: edit(f / "config.json", num_key_value_heads=3), "do not split"),
    "field of the wrong kind": (lambda f: edit(f / "config.json", num_attention_heads="four"), "wrong kind"),
    "rope": (lambda f: edit(f / "config.json", rope_scaling={"rope_type": "yarn"}), "rope_type 'yarn'"),
    "section": (
        lambda f: edit(f / "config.json", rope_scaling={"type": "mrope", "mrope_section": [1, 2, 3]}),
        "mrope_section",
    ),
    "no weights": (lambda f: (f / SINGLE).unlink(), "holds neither"),
    "pickle only": (lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"), "pickle"),
    "truncated": (lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-100]), "not a readable safetensors"),
    "garbage": (lambda f: (f / SINGLE).write_bytes(b"x" * 100), "not a readable safetensors"),
    "missing weight": (lambda f: retensor(f, lambda t: t.pop("model.norm.weight")), "lacks norm.weight"),
    "extra weight": (lambda f: retensor(f, lambda t: t.update(foo=torch.ones(1))), "no place for: foo"),
    "wrong shape": (lambda f: retensor(f, lambda t: t.update({"model.norm.weight": torch.ones(5)})), r"shape \(5,\)"),
    "quantised": (
        lambda f: retensor(f, lambda t: t.update({"model.norm.weight": torch.ones(96, dtype=torch.int8)})),
        "quantised",
    ),
    "shard outside": (lambda f: shard(f, {"x": "../evil.safetensors"}), "same folder"),
    "shard is a pickle": (lambda f: shard(f, {"x": "weights.bin"}), "must be safetensors"),
    "missing shard": (lambda f: shard(f, {"x": "model-00003-of-00003.safetensors"}), "does not exist"),
    "broken index": (lambda f: (f / INDEX).write_text('{"weight_map": 3}'), "weight_map"),
}


def edit_out(folder: Path, key: str) -> None:
    raw = json.loads((folder / "config.json").read_text())
    del raw[key]
    (folder / "config.json").write_text(json.dumps(raw))


def retensor(folder: Path, change) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_gets_one_clear_error(name, folder):
    breaking, message = BROKEN[name]
    breaking(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        from_pretrained(folder, progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["does/not/exist", "nothing-here", "./missing", ""])
def test_names_that_are_neither_a_folder_nor_on_the_hub(name):
    with pytest.raises(CheckpointError, match="neither a folder nor a Hub name"):
        from_pretrained(name or " ", progress=False)


def test_a_file_is_no_folder(folder):
    with pytest.raises(CheckpointError, match="is a file"):
        from_pretrained(folder / "config.json")


def test_hub_download(vlm, monkeypatch):
    """A name with one slash goes to the Hub, for safetensors and JSON only; what fails there is said in one line."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = {}

    def download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(vlm)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert from_pretrained("someone/some-model", progress=False).visual is not None
    assert asked["name"] == "someone/some-model"
    assert not any(p.endswith((".bin", ".pt", "*")) for p in asked["patterns"])

    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"could not be downloaded from the Hub: no connection$"):
        from_pretrained("someone/some-model")
