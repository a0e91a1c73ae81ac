"""Loading a checkpoint: a folder or a Hub name in, a `Model` with its weights on the wanted device out.

Weights are read from safetensors only. The headers of all files are compared with the config before a module is built
or a number is read; then one tensor at a time goes straight to its device and dtype, so that the peak is the model
plus its largest tensor.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from hybridkv.model.config import Config, load_config
from hybridkv.model.decoder import Model
from hybridkv.model.fields import CheckpointError, show
from hybridkv.model.shards import FLOATS, Stored, opened, some, stored_tensors

HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


def resolve(name: str | Path) -> Path:
    """The folder of a checkpoint; a name that is no folder is downloaded from the Hugging Face Hub."""
    try:
        folder = Path(name).expanduser()
        if name != "" and folder.is_dir():
            return folder
        is_file = folder.is_file()
    except (OSError, RuntimeError, ValueError) as e:  # too long, ~nobody, no name at all
        raise CheckpointError(f"{show(str(name))} is no folder: {getattr(e, 'strerror', None) or e}") from e
    if is_file:
        raise CheckpointError(f"{folder} is a file: give the folder that holds config.json and the safetensors files")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name), re.ASCII):
        raise CheckpointError(
            f"{show(str(name))} is neither a folder nor a Hub name such as Qwen/Qwen2.5-VL-3B-Instruct"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=HUB_FILES))
    except Exception as e:  # any: the Hub client's HTTP library, and with it the errors of a network, change
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise CheckpointError(
            f"{show(str(name))} is no folder here and could not be downloaded from the Hub: {reason}"
        ) from e


def usable_device(device: str | torch.device) -> torch.device:
    """The device, or a `ValueError` that names those that this machine has."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    names = ["cpu"] + [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):  # no name of a device
        wanted = torch.device("meta")
    if wanted.type == "cpu" and not wanted.index:
        return torch.device("cpu")
    if f"{wanted.type}:{wanted.index or 0}" not in names:
        raise ValueError(f"device {show(str(device))} can't be used: this machine has {', '.join(names)}")
    return wanted


def _sizes(cfg: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors in which every size of a config shows."""
    hidden, head = cfg.hidden_size, cfg.head_dim
    yield EMBEDDING, (cfg.vocab_size, hidden)
    yield "layers.0.self_attn.q_proj.weight", (cfg.num_attention_heads * head, hidden)
    yield "layers.0.self_attn.k_proj.weight", (cfg.num_key_value_heads * head, hidden)
    yield "layers.0.mlp.up_proj.weight", (cfg.intermediate_size, hidden)
    if v := cfg.vision:
        patch = (v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
        yield "visual.patch_embed.proj.weight", (v.hidden_size, *patch)
        yield "visual.blocks.0.mlp.up_proj.weight", (v.intermediate_size, v.hidden_size)
        yield "visual.merger.mlp.2.weight", (v.out_hidden_size, v.hidden_size * v.spatial_merge_size**2)


def _build(cfg: Config, stored: dict[str, Stored], folder: Path) -> Model:
    """A model without numbers whose parameters are those that the files hold.

    Layers are counted and sizes compared first: a config that is wrong by far would take all memory or forever.
    """

    def compare(name: str, shape: tuple[int, ...]) -> None:
        if name not in stored:
            raise CheckpointError(f"{folder} lacks {name}")
        if stored[name].shape != shape:
            raise CheckpointError(f"{stored[name]} has shape {stored[name].shape}, config.json wants {shape}")

    for name, shape in _sizes(cfg):
        compare(name, shape)
    counts = {"layers": ("num_hidden_layers", cfg.num_hidden_layers)}
    if cfg.vision:
        counts["visual.blocks"] = ("vision_config.depth", cfg.vision.depth)
    for prefix, (field, wanted) in counts.items():
        start = len(prefix) + 1
        held = len({name[start:].partition(".")[0] for name in stored if name.startswith(f"{prefix}.")})
        if held != wanted:
            raise CheckpointError(f"{folder} holds the weights of {held} {prefix}, config.json wants {field} {wanted}")

    with torch.device("meta"):
        model = Model(cfg)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if missing := shapes.keys() - stored.keys():
        raise CheckpointError(f"{folder} lacks {some(missing)}")
    for name, shape in shapes.items():
        compare(name, shape)
    if extra := stored.keys() - shapes.keys():
        keys = [stored[name].key for name in extra]
        raise CheckpointError(f"{folder} holds weights this model has no place for: {some(keys)}")
    return model


def _read(entry: Stored, dtype: torch.dtype) -> torch.Tensor:
    with opened(entry.file) as tensors:
        return tensors.get_tensor(entry.key).to(dtype)


def _settle_head(cfg: Config, stored: dict[str, Stored], dtype: torch.dtype | None) -> Config:
    """What transformers does about an output layer that is stored although the config ties it to the embedding.

    Equal copies are one; different ones are both kept; an output layer alone is the embedding, too.
    """
    if not cfg.tie_word_embeddings or HEAD not in stored:
        return cfg
    if EMBEDDING not in stored:
        stored[EMBEDDING] = stored.pop(HEAD)
        return cfg
    embedding, head = stored[EMBEDDING], stored[HEAD]
    if embedding.shape != head.shape:
        return cfg  # no copy: a weight without a place
    to = dtype or embedding.dtype
    if not torch.equal(_read(embedding, to), _read(head, to)):
        return replace(cfg, tie_word_embeddings=False)
    del stored[HEAD]
    return cfg


def _set(model: nn.Module, name: str, value: torch.Tensor, dtype: torch.dtype) -> None:
    parameter = model.get_parameter(name)
    if not parameter.is_meta:  # a part of a joined one, whose place is there
        parameter.copy_(value)
        return
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(value.to(dtype), requires_grad=False))


def from_pretrained(
    name: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Model:
    """Loads a Qwen2.5-VL, Qwen2 / Qwen2.5 or Llama-style checkpoint.

    Args:
        name: a folder with `config.json` and safetensors, or a Hub name.
        dtype: of the weights: bfloat16, float16, float32 or float64; None keeps the stored embedding's.
        device: where the weights go.
        progress: show a bar on stderr, if it is a terminal.

    Raises:
        CheckpointError: anything about the checkpoint that can't be used, in one line.
        ValueError: a dtype or device that can't be used, in one line.
    """
    if dtype is not None and dtype not in FLOATS.values():
        raise ValueError(f"dtype {dtype} can't be used: give {', '.join(map(str, FLOATS.values()))}")
    device = usable_device(device)
    folder = resolve(name)
    cfg, stored = load_config(folder), stored_tensors(folder)
    cfg = _settle_head(cfg, stored, dtype)
    model = _build(cfg, stored, folder)
    dtype = dtype or stored[EMBEDDING].dtype
    model.join(device, dtype)
    by_file = groupby(sorted(stored, key=lambda name: stored[name].file), key=lambda name: stored[name].file)
    size = sum(p.numel() * stored[name].dtype.itemsize for name, p in model.named_parameters())
    hidden = None if progress else True  # None: tqdm looks whether stderr is a terminal
    with tqdm(total=size, desc="loading", unit="B", unit_scale=True, disable=hidden, leave=False) as bar:
        for file, names in by_file:
            with opened(file, str(device)) as tensors:
                for target in names:
                    value = tensors.get_tensor(stored[target].key)
                    bar.update(value.nbytes)
                    _set(model, target, value, dtype)
    return model.eval()
