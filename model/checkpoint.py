"""Loading a checkpoint: a folder or a Hub name in, a `Model` with its weights on the wanted device out.

Weights are read from safetensors only, one tensor at a time, straight to their device and dtype, so that the peak is
the model plus its largest tensor.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from hybridkv.model.config import CheckpointError, load_config, read_json
from hybridkv.model.decoder import Model

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja"]


def resolve(name: str | Path) -> Path:
    """The folder of a checkpoint; a name that is no folder is downloaded from the Hugging Face Hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file: give the folder that holds config.json and the safetensors files")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
        raise CheckpointError(f"{name} is neither a folder nor a Hub name such as Qwen/Qwen2.5-VL-3B-Instruct")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0]
        raise CheckpointError(f"{name} is no folder here and could not be downloaded from the Hub: {reason}") from e


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: one file, or the shards that its index names."""
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise CheckpointError(f"{index} must hold a weight_map of tensor names to file names")
        files = []
        for name in sorted(set(weight_map.values())):
            path = folder / name
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index} points to {name!r}: shards must be safetensors files in the same folder"
                )
            if not path.is_file():
                raise CheckpointError(f"{path} is named in the index but does not exist: download it again")
            files.append(path)
        return files
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
        raise CheckpointError(f"{folder} holds pickle weights only: convert them to safetensors, pickles are not read")
    raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def our_name(name: str) -> str:
    """Maps both key layouts to this package's: `model.layers.*` and `model.language_model.layers.*` to `layers.*`."""
    return re.sub(r"^(model\.language_model\.|language_model\.model\.|model\.)", "", name)


def _set(model: nn.Module, name: str, value: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))


def from_pretrained(
    name: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Model:
    """Loads a Qwen2.5-VL, Qwen2 / Qwen2.5 or Llama-style checkpoint.

    Args:
        name: a folder with `config.json` and safetensors, or a Hub name.
        dtype: of the weights; None keeps what the first weight file has.
        device: where the weights go.
        progress: show a bar on stderr, if it is a terminal.

    Raises:
        CheckpointError: anything about the checkpoint that can't be used, in one line.
    """
    folder = resolve(name)
    cfg = load_config(folder)
    files = weight_files(folder)
    with torch.device("meta"):
        model = Model(cfg)
    missing = {n: p.shape for n, p in model.named_parameters()}
    extra = []
    size = sum(f.stat().st_size for f in files)
    hidden = None if progress else True  # None: tqdm looks whether stderr is a terminal
    with tqdm(total=size, desc="loading", unit="B", unit_scale=True, disable=hidden, leave=False) as bar:
        for file in files:
            try:
                with safe_open(file, framework="pt", device=str(device)) as tensors:
                    for key in tensors.keys():  # noqa: SIM118 (not a dict)
                        target = our_name(key)
                        if target.endswith("rotary_emb.inv_freq") or (
                            target == "lm_head.weight" and model.lm_head is None
                        ):
                            continue  # derived from the config; a tied head repeats the embedding
                        if target not in missing:
                            extra.append(key)
                            continue
                        shape = tuple(tensors.get_slice(key).get_shape())
                        if shape != missing[target]:
                            raise CheckpointError(
                                f"{file.name}: {key} has shape {shape}, config.json wants {tuple(missing[target])}"
                            )
                        value = tensors.get_tensor(key)
                        if not value.is_floating_point():
                            raise CheckpointError(
                                f"{file.name}: {key} holds {value.dtype}; quantised weights are not supported"
                            )
                        dtype = dtype or value.dtype
                        bar.update(value.nbytes)
                        _set(model, target, value.to(dtype))
                        del missing[target]
            except SafetensorError as e:
                raise CheckpointError(f"{file} is not a readable safetensors file: {e}") from e
    if missing:
        raise CheckpointError(f"{folder} lacks {_some(missing)}")
    if extra:
        raise CheckpointError(f"{folder} holds weights this model has no place for: {_some(extra)}")
    return model.eval()


def _some(names: list[str] | dict) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
