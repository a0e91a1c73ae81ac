"""The safetensors files of a checkpoint folder: which are read, and what their headers say that they hold."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hybridkv.model.fields import CheckpointError, read_json, show

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Stored:
    """One tensor, as its file's header describes it."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.file.name}: {self.key}"


@contextmanager
def opened(file: Path, device: str = "cpu") -> Iterator[safe_open]:
    """A safetensors file, open; what is wrong with it is a `CheckpointError`."""
    try:
        with safe_open(file, framework="pt", device=device) as tensors:
            yield tensors
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{file} is not a readable safetensors file: {e}") from e


def our_name(name: str) -> str:
    """Maps both key layouts to this package's: `model.layers.*` and `model.language_model.layers.*` to `layers.*`."""
    return re.sub(r"^(model\.language_model\.|language_model\.model\.|model\.)", "", name)


def weight_files(folder: Path) -> dict[Path, set[str]]:
    """The files to read, and the tensors that the index promises in each.

    As in transformers, one whole file goes before an index with its shards.
    """
    index, single = folder / INDEX, folder / SINGLE
    if single.is_file():
        return {single: set()}
    if not index.is_file():
        if any(next(folder.glob(pattern), None) for pattern in ("*.bin", "*.pt", "*.pth")):
            raise CheckpointError(
                f"{folder} holds pickle weights only: convert them to safetensors, pickles are not read"
            )
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()) or not weight_map:
        raise CheckpointError(f"{index} must hold a weight_map of tensor names to file names")
    files: dict[Path, set[str]] = {}
    for key, name in weight_map.items():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} points to {show(name)}: shards must be safetensors files in the same folder"
            )
        files.setdefault(folder / name, set()).add(key)
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is named in the index but does not exist: download it again")
    return files


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor by the name that this package gives it, from the headers alone.

    Raises:
        CheckpointError: a file is missing or broken, holds other than floating-point numbers, lacks what the index
            promises, or two tensors have one name.
    """
    found: dict[str, Stored] = {}
    for file, promised in weight_files(folder).items():
        with opened(file) as tensors:
            keys = list(tensors.keys())
            absent = promised.difference(keys)
            if absent:
                raise CheckpointError(f"{file} lacks {some(absent)}, which {INDEX} says it holds: download it again")
            for key in keys:
                name = our_name(key)
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # derived from the config
                entry = tensors.get_slice(key)
                dtype = FLOATS.get(entry.get_dtype())
                if dtype is None:
                    raise CheckpointError(
                        f"{file.name}: {key} holds {entry.get_dtype()}; quantised weights are not supported"
                    )
                if name in found:
                    raise CheckpointError(
                        f"{folder} holds {name} twice, as {found[name]} and {file.name}: {key}: remove one of them"
                    )
                found[name] = Stored(file, key, tuple(entry.get_shape()), dtype)
    return found


def some(names: set[str] | list[str]) -> str:
    """The first few of many names."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
