"""What the speed and memory benchmarks share: shapes, random models and contexts, the machine, the roofline, rows."""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from hybridkv.config import HybridConfig
from hybridkv.model import from_pretrained
from hybridkv.model.checkpoint import resolve
from hybridkv.model.config import Config, load_config
from hybridkv.model.decoder import Model
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.planning.prefill import LayerProfile, Prefill

QUESTION = 64  # tokens at the end of a random context that every head keeps
COPY_BYTES = 1 << 28  # far above any cache

# Decoders of the published checkpoints (their config.json), and a small one with the 7B's attention for CPUs.
SHAPES = {
    "small": dict(
        layers=2, kv_heads=4, group=7, head_dim=128, hidden_size=512, intermediate_size=1024, vocab_size=1024, tied=True
    ),
    "qwen2.5-vl-3b": dict(
        layers=36,
        kv_heads=2,
        group=8,
        head_dim=128,
        hidden_size=2048,
        intermediate_size=11008,
        vocab_size=151936,
        tied=True,
    ),
    "qwen2.5-vl-7b": dict(
        layers=28,
        kv_heads=4,
        group=7,
        head_dim=128,
        hidden_size=3584,
        intermediate_size=18944,
        vocab_size=152064,
        tied=False,
    ),
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The decoder, where it runs, and where rows go."""
    add = partial(parser.add_argument, type=int)
    parser.add_argument(
        "--shape", choices=SHAPES, default="small", help="a decoder with random weights (default: small)"
    )
    parser.add_argument("--model", help="a checkpoint folder or Hub name: real weights instead")
    for name in ("layers", "kv-heads", "group", "head-dim", "hidden-size", "intermediate-size", "vocab-size"):
        add(f"--{name}", help="instead of the shape's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")


def model_config(args: argparse.Namespace) -> Config:
    """The decoder that the arguments describe."""
    if args.model:
        return load_config(resolve(args.model))
    chosen = {name: getattr(args, name) for name in SHAPES["small"] if name != "tied"}
    return shape_config(**SHAPES[args.shape] | {name: value for name, value in chosen.items() if value is not None})


def make_model(args: argparse.Namespace) -> Model:
    """That decoder with its weights, without gradients."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    if args.model:
        return from_pretrained(args.model, dtype=dtype, device=args.device)
    return random_model(model_config(args), args.device, dtype)


def shape_config(
    layers: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    hidden_size: int,
    intermediate_size: int,
    vocab_size: int,
    tied: bool,
) -> Config:
    return Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=1 << 20,
        attention_bias=True,
        tie_word_embeddings=tied,
    )


def random_model(cfg: Config, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # weights of the 7B in float32 first would need twice the memory
    try:
        with torch.device(device):
            model = Model(cfg).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)
    model.join()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # what the weights took before
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return model


def spread_profile(cfg: Config, share: float) -> HeadProfile:
    """A head profile by which a share of the layers needs retrieval: as many as that is, spread evenly."""
    need = torch.zeros(cfg.num_hidden_layers, cfg.num_key_value_heads)
    count = max(1, round(share * len(need)))
    need[torch.linspace(0, len(need) - 1, count).round().long()] = 1.0
    return HeadProfile(need, need)


def random_prefill(model: Model, tokens: int, config: HybridConfig, seed: int = 0) -> Prefill:
    """The record of a prompt that was never read: random keys, values and profile, the question not prunable."""
    cfg = model.cfg
    generator = torch.Generator(model.device).manual_seed(seed)
    draw = dict(generator=generator, device=model.device)
    prefill = Prefill(torch.arange(tokens, device=model.device) < tokens - QUESTION, config)
    for _ in range(cfg.num_hidden_layers):
        k, v = torch.randn(2, cfg.num_key_value_heads, tokens, cfg.head_dim, dtype=model.dtype, **draw)
        score, mass = torch.rand(k.shape[:2], **draw), torch.rand(len(k), **draw)
        prefill.layers.append(LayerProfile(k, v, k[:, :0], score, score, mass, mass))
    prefill.like = k[:, :0]
    return prefill


def weight_bytes(model: Model) -> int:
    """Weights that a decoding step reads: all of the decoder's, but of an untied embedding only a row."""
    unread = ("visual.",) if model.lm_head is None else ("visual.", "embed_tokens.")
    return sum(p.nbytes for name, p in model.named_parameters() if not name.startswith(unread))


def copy_bandwidth(device: str, repeats: int = 9) -> float:
    """Bytes a second that the device reads and writes when it copies a large tensor: median."""
    copies = 16 if device.startswith("cuda") else 1  # one is over in a fraction of a millisecond, waiting included
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        target[-1].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * copies * COPY_BYTES / statistics.median(seconds)


def describe(module: str, args: argparse.Namespace, argv: Sequence[str] | None) -> dict:
    """What a row needs to be understood: model, machine, versions, command. Prints them, too."""
    cfg, cuda = model_config(args), args.device.startswith("cuda")
    about = {
        "model": args.model or args.shape,
        "layers": cfg.num_hidden_layers,
        "kv_heads": cfg.num_key_value_heads,
        "group": cfg.num_attention_heads // cfg.num_key_value_heads,
        "head_dim": cfg.head_dim,
        "device": args.device,
        "dtype": args.dtype,
        "machine": torch.cuda.get_device_name() if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "command": f"python -m {module} {' '.join(sys.argv[1:] if argv is None else argv)}",
    }
    print(f"{about['command']}\ntorch {about['torch']}, {about['machine']}, {about['threads']} threads, {args.dtype}")
    return about


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_row(file: Path | None, row: dict) -> None:
    """Appends at once, so that a run that is cut off leaves what it had."""
    if file:
        with open(file, "a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
