"""The head profile that a checkpoint has without anybody's doing: its own, or one of the built-in samples.

    config = HybridConfig(head_profile=builtin_profile(model, processor))
    engine = Engine(model, config)

Measuring takes from seconds to minutes, once: profiles are kept in a cache folder under a fingerprint of the weights.
"""

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from hybridkv.config import HybridConfig
from hybridkv.fingerprint import fingerprint
from hybridkv.planning import samples
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.planning.need import measure_heads

BROUGHT = "head_profile.json"  # in a checkpoint folder
VERSION = 1  # of the samples and of what is measured: profiles of another one are measured again
NEW_TOKENS = 12  # of each answer that are looked at


def cache_folder() -> Path:
    """Where profiles are kept: $HYBRIDKV_CACHE, else hybridkv in the user's cache folder."""
    if own := os.environ.get("HYBRIDKV_CACHE"):
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "hybridkv"
    except RuntimeError:  # a user without a home: nothing is kept
        return Path(os.devnull) / "hybridkv"


def brought_profile(folder: str | Path) -> HeadProfile | None:
    """The profile that a checkpoint folder brings with it, as the bundled model does; None if there is none.

    Raises:
        ValueError: it is no head profile.
    """
    file = Path(folder) / BROUGHT
    return HeadProfile.load(file) if file.is_file() else None


def builtin_profile(
    model: nn.Module,
    processor: object,
    cache: str | Path | None = None,
    progress: bool = True,
    before: Callable[[], None] | None = None,
) -> HeadProfile | None:
    """Which heads need retrieval, measured on the built-in samples; out of the cache folder if they were before.

    A profile of prompts like your own (`python -m hybridkv.calibrate`) knows better.

    Args:
        model, processor: as `hybridkv.model` has them: the processor makes prompts, and its `tokenizer` answers.
        cache: the folder to keep it in; default `cache_folder()`. One that can't be written to is no error. What a
            run that was cut off has measured is kept there, too.
        progress: show a bar on stderr, if it is a terminal.
        before: called before anything is measured, which takes a while.

    Returns:
        None if the model can't be asked any of the samples.
    """
    folder = cache_folder() if cache is None else Path(cache)
    name, asked = _name(model), samples.TEXTS + samples.PICTURES * bool(processor.cfg.vision)
    if known := _load(folder / f"{name}.json"):
        return known
    if before:
        before()
    measured, parts = [], []
    for sample in tqdm(asked, desc="measuring heads", leave=False, disable=None if progress else True):
        parts.append(folder / f"{name}-{sample.name}.json")
        profile = _load(parts[-1])
        if profile is None:
            profile = _measure(model, processor, sample)
            _save(profile, parts[-1])
        measured += [profile] * (profile is not None)
    if not measured:
        return None
    joined = HeadProfile.join(measured, "built-in samples")
    _save(joined, folder / f"{name}.json")
    for part in parts:
        with suppress(OSError):
            part.unlink()
    return joined


def _name(model: nn.Module) -> str:
    """Names a model's profile: another one when its weights change, or `VERSION`."""
    return f"heads-{VERSION}-{fingerprint(model)}"


def _measure(model: nn.Module, processor: object, sample: samples.Sample) -> HeadProfile | None:
    """One sample's profile; None if this model can't be asked it, answers in numbers that are not finite, or fills the
    memory with it.
    """
    try:
        prompt, answer = samples.make(sample, processor)
        if len(prompt.input_ids) + NEW_TOKENS > processor.cfg.max_position_embeddings:
            return None
        return measure_heads(model, prompt, HybridConfig(strict=False), NEW_TOKENS, answer=answer)
    except (ValueError, MemoryError, torch.OutOfMemoryError):
        return None


def _load(file: Path) -> HeadProfile | None:
    try:
        return HeadProfile.load(file) if file.is_file() else None
    except (ValueError, OSError):  # cut off, or somebody else's: measured again
        return None


def _save(profile: HeadProfile | None, file: Path) -> None:
    """Writes a file at once or not at all; if the folder can't be written to, not at all."""
    if profile is None:
        return
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, new = tempfile.mkstemp(prefix=".hybridkv-", suffix=".tmp", dir=file.parent)
        os.close(handle)
        try:
            profile.save(new)
            os.replace(new, file)
        finally:
            Path(new).unlink(missing_ok=True)
