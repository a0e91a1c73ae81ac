"""Loading: layouts, dtypes, shards, and a clear error for everything that can be wrong with a folder."""

import copy
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridkv.model import CheckpointError, Model, from_pretrained
from hybridkv.model.shards import INDEX, SINGLE, our_name
from tests.fuzz_checkpoints import fuzz


@pytest.fixture
def folder(vlm: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(vlm, tmp_path / "copy")


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def edit(path: Path, **changes) -> None:
    raw = json.loads(path.read_text())
    raw.update(changes)
    path.write_text(json.dumps(raw))


def shard(folder: Path, index_names: dict[str, str] | None = None) -> None:
    """Splits the one weight file into two and writes the index."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    files = {n: SHARDS[i % 2] for i, n in enumerate(names)}
    for file in SHARDS:
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file)
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {**files, **(index_names or {})}}))


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_shards_load_like_a_single_file(vlm, folder):
    shard(folder)
    assert same(from_pretrained(folder, progress=False), from_pretrained(vlm, progress=False))


def test_one_file_goes_before_an_index(vlm, folder):
    """As in transformers: older shards beside a newer single file are not read."""
    newer = load_file(folder / SINGLE)
    retensor(folder, lambda t: t.update({k: torch.zeros_like(v) for k, v in t.items()}))
    shard(folder)
    save_file(newer, folder / SINGLE)
    assert same(from_pretrained(folder, progress=False), from_pretrained(vlm, progress=False))


@pytest.mark.parametrize("change", ["equal", "different", "alone", "other shape"])
def test_a_stored_output_layer_of_a_tied_model(folder, change):
    """As in transformers: equal copies are one, different ones are both kept, one alone is the embedding, too."""
    edit(folder / "config.json", tie_word_embeddings=True)
    tensors = load_file(folder / SINGLE)
    embedding = tensors["model.embed_tokens.weight"]
    head = {"different": tensors["lm_head.weight"], "other shape": embedding[1:]}.get(change, embedding).clone()
    tensors["lm_head.weight"] = head
    if change == "alone":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / SINGLE)
    if change == "other shape":
        with pytest.raises(CheckpointError, match=r"no place for: lm_head.weight"):
            from_pretrained(folder, progress=False)
        return
    model, hidden = from_pretrained(folder, progress=False), torch.randn(1, 96)
    assert model.cfg.tie_word_embeddings == (model.lm_head is None) == (change != "different")
    assert torch.equal(model.embed_tokens.weight, embedding)
    torch.testing.assert_close(model.logits(hidden), hidden @ head.T)


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


def test_dtype_and_device(folder):
    for device in ("cpu", "cpu:0", torch.device("cpu")):
        assert {p.dtype for p in from_pretrained(folder, torch.bfloat16, device).parameters()} == {torch.bfloat16}
    for dtype in (torch.float16, torch.float64):
        retensor(folder, lambda t, dtype=dtype: t.update({k: v.to(dtype) for k, v in t.items() if "embed" in k}))
        assert {p.dtype for p in from_pretrained(folder, progress=False).parameters()} == {dtype}
    assert not any(p.is_meta or p.requires_grad for p in from_pretrained(folder, progress=False).parameters())


def test_weights_arrive_one_at_a_time(folder, monkeypatch):
    """The peak is the model and its largest tensor: no more than one loaded tensor is alive beside the parameters."""
    import hybridkv.model.checkpoint as checkpoint

    loaded = []
    original = checkpoint._set

    def watching(model, name, value, dtype):
        assert not any(ref() is not None for ref in loaded), name  # bfloat16 now, those before in float32, or joined
        loaded.append(weakref.ref(value))
        original(model, name, value, dtype)

    retensor(folder, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    monkeypatch.setattr(checkpoint, "_set", watching)
    model = from_pretrained(folder, dtype=torch.float32, progress=False)
    assert len(loaded) == len(list(model.parameters()))


def test_layers_with_one_input_share_one_tensor_under_the_checkpoints_names(vlm, folder):
    """Nothing is held twice, whatever is done to the model afterwards, and each weight is the file's."""
    model, stored = from_pretrained(vlm, progress=False), load_file(vlm / SINGLE)
    for attempt in range(4):
        attention, mlp = model.layers[0].self_attn, model.layers[0].mlp
        for joined, *parts in (
            (attention.qkv, attention.q_proj, attention.k_proj, attention.v_proj),
            (mlp.gate_up, mlp.gate_proj, mlp.up_proj),
        ):
            storage = joined.weight.untyped_storage()
            assert all(part.weight.untyped_storage().data_ptr() == storage.data_ptr() for part in parts)
            assert storage.nbytes() == sum(part.weight.nbytes for part in parts)
            assert torch.equal(joined.weight, torch.cat([part.weight for part in parts]))
            assert joined.bias is None or torch.equal(joined.bias, torch.cat([part.bias for part in parts]))
        state = model.state_dict()
        for name, value in stored.items():
            assert torch.equal(state[name.removeprefix("model.")], value.to(model.dtype)), name
        if attempt == 0:
            model = model.to(torch.float64)
        elif attempt == 1:
            model = copy.deepcopy(model)
            model.load_state_dict(state)
        elif attempt == 2:
            model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)


def test_a_joined_model_says_what_its_layers_would(vlm):
    joined = from_pretrained(vlm, dtype=torch.float64, progress=False)
    apart = Model(joined.cfg).double()
    apart.load_state_dict(joined.state_dict())
    x, positions = torch.randn(2, 7, 96, dtype=torch.float64), torch.arange(7).expand(3, 2, -1)
    assert apart.layers[0].mlp.gate_up.weight is None
    torch.testing.assert_close(joined(x, positions), apart(x, positions), rtol=1e-10, atol=1e-10)


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
    "broken index": (lambda f: (shard(f), (f / INDEX).write_text('{"weight_map": 3}')), "weight_map"),
    "empty index": (lambda f: (shard(f), (f / INDEX).write_text('{"weight_map": {}}')), "weight_map"),
    "broken promise": (lambda f: shard(f, {"model.more.weight": SHARDS[0]}), "lacks model.more.weight, which"),
    "one tensor in two shards": (lambda f: (shard(f), repeat(f, "model.norm.weight")), "holds norm.weight twice"),
    "one tensor in two layouts": (
        lambda f: retensor(f, lambda t: t.update({"model.language_model.norm.weight": t["model.norm.weight"] + 1})),
        "holds norm.weight twice",
    ),
    "fp8": (lambda f: cast(f, torch.float8_e4m3fn), "F8_E4M3; quantised"),
    "fp8 with scales": (
        lambda f: (cast(f, torch.float8_e5m2), retensor(f, lambda t: t.update({"x.weight_scale_inv": torch.ones(1)}))),
        "F8_E5M2; quantised",
    ),
    "complex numbers": (lambda f: cast(f, torch.complex64), "C64; quantised"),
    "one layer less": (
        lambda f: retensor(f, lambda t: [t.pop(k) for k in [*t] if "model.layers.1." in k]),
        "weights of 1 layers, config.json wants num_hidden_layers 2",
    ),
    "many layers": (
        lambda f: edit(f / "config.json", num_hidden_layers=10**9),
        "weights of 2 layers, config.json wants num_hidden_layers 1000000000",
    ),
    "a wide model": (lambda f: edit(f / "config.json", intermediate_size=2**31 - 1), r"wants \(2147483647, 96\)"),
    "an adapter beside the model": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "holds an adapter beside a model: merge it",
    ),
    "an adapter alone": (
        lambda f: ((f / "config.json").unlink(), (f / SINGLE).rename(f / "adapter_model.safetensors")),
        "is an adapter, not a model: merge it",
    ),
    "a name with a line break": (lambda f: retensor(f, lambda t: t.update({"a\nb": torch.ones(1)})), "place for: a b"),
}


def repeat(folder: Path, name: str) -> None:
    """A tensor that one shard holds, in the other, too."""
    first, second = (load_file(folder / file) for file in SHARDS)
    value = {**first, **second}[name]
    for file, tensors in zip(SHARDS, (first, second), strict=True):
        save_file({**tensors, name: value}, folder / file)


def cast(folder: Path, dtype: torch.dtype) -> None:
    """One weight in another dtype."""
    name = "model.layers.0.mlp.up_proj.weight"
    retensor(folder, lambda t: t.update({name: t[name].to(dtype)}))


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


def test_a_sample_of_the_fuzzer():
    counts = fuzz(60, seed=1, logits_every=4)
    assert counts["failures"] == []
    assert counts["valid, logits"] == 3 and counts["valid"] == 21 and counts["refused"] > 20
