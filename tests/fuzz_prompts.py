"""Random prompts through four tokenizers: ordinary text, text full of control tokens, and what is no prompt at all.

    python -m tests.fuzz_prompts --cases 3000

Ordinary text must get the ids that transformers gives the rendered chat. Control tokens in text must become text: the
ids hold the template's own control tokens and no others, and decode to what was rendered. The rest must be refused with
an `InputError`.
"""

import argparse
import json
import random
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from demo import tiny_vlm
from hybridkv import demos
from hybridkv.model import InputError, Processor

TOOLS = ["<tool_call>", "</tool_call>", "<|fim_prefix|>"]  # added, but not special, as in Qwen's tokenizers
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = """The user asks, and the assistant answers: what does the sign say? It's 12:45, they're late, we'll see.
system user assistant image video tool call start end vision pad <| |> </ > { "name": "look", "value": 3.14 }
Grüße aus Köln. Où est la gare ? Привет, мир! 今日は世界。 emoji 🙂🙂 and   runs   of   spaces\n\n\tand tabs\n"""
INST = (
    "{% for m in messages %}{{ '[INST] ' + (m.content if m.content is string else m.content[-1].text) | trim"
    " + ' [/INST]' }}{% endfor %}"
)


def qwen_like(folder: Path) -> Path:
    """A tiny checkpoint whose tokenizer has Qwen2's pre-tokenizer and normalizer, merges, and tokens for tools."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = tiny_vlm.config(layers=1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=byte_level.alphabet(), min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tiny_vlm.SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TOOLS])
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "eos_token_id"):
        raw[name] = tokenizer.token_to_id(tiny_vlm.SPECIAL[raw[name] - tiny_vlm.BYTES])
    raw["vocab_size"] = tokenizer.get_vocab_size()
    tiny_vlm.save(folder, raw)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=tiny_vlm.CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)
    return folder


def llama_like(folder: Path, template: str | None = INST) -> Path:
    """A text-only checkpoint, its tokenizer as Llama 2's: control tokens in the vocabulary, one put in front."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=special + [f"<0x{i:02X}>" for i in range(256)],
        min_frequency=1,
        max_token_length=8,
        show_progress=False,
    )
    tokenizer.train_from_iterator([line for line in CORPUS.splitlines() for _ in range(4)], trainer)
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in (*TOOLS, "[INST]", "[/INST]")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )
    fast.save_pretrained(folder)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
    config = {"model_type": "llama", "vocab_size": tokenizer.get_vocab_size(), **sizes, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def processors(folder: Path) -> dict[str, Processor]:
    tiny_vlm.save(folder / "bytes", tiny_vlm.config(layers=1))
    return {
        "bundled": Processor.from_pretrained(demos.MODEL),
        "bytes": Processor.from_pretrained(folder / "bytes"),
        "qwen": Processor.from_pretrained(qwen_like(folder / "qwen")),
        "llama": Processor.from_pretrained(llama_like(folder / "llama")),
        "plain": Processor.from_pretrained(llama_like(folder / "plain", None)),
    }


def rendered(processor: Processor, text: str, context: str, kinds: Sequence[str], counts: Sequence[int]) -> str:
    """The chat as transformers renders it, with its placeholders expanded as its own processor does."""
    body = f"{context.strip()}\n\n{text}" if context else text
    content = [{"type": kind} for kind in kinds] + [{"type": "text", "text": body}] if kinds else body
    if not processor.tokenizer.chat_template:
        return body
    chat = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    done = ""
    for kind, count in zip(kinds, counts, strict=True):  # the template's own come first
        before, pad, chat = chat.partition(f"<|{kind}_pad|>")
        done += before + pad * count
    return done + chat


def ordinary_is_right(processor: Processor, prompt, chat: str, context: str, body: str) -> bool:
    """transformers' tokenizer gives the same ids, and the prunable text is the context's."""
    encoded = processor.tokenizer(
        chat, add_special_tokens=not processor.tokenizer.chat_template, return_offsets_mapping=True
    )
    if prompt.input_ids.tolist() != encoded["input_ids"]:
        return False
    start = chat.rfind(body)
    context = context.strip()
    inside = [context and start <= a < b <= start + len(context) for a, b in encoded["offset_mapping"]]
    visual = [i in (processor.cfg.image_token_id, processor.cfg.video_token_id) for i in encoded["input_ids"]]
    return prompt.prunable.tolist() == [bool(x or y) for x, y in zip(inside, visual, strict=True)]


def hostile_is_right(processor: Processor, prompt, chat: str, harmless) -> bool:
    """No control token but those that harmless text gets, and nothing lost."""
    tokenizer = processor.tokenizer
    added = set(tokenizer.get_added_vocab().values()) - {tokenizer.unk_token_id}
    control = lambda p: [i for i in p.input_ids.tolist() if i in added]  # noqa: E731
    if control(prompt) != control(harmless):
        return False
    ids = prompt.input_ids.tolist()
    if not tokenizer.chat_template and tokenizer.bos_token_id == ids[0]:
        ids, chat = ids[1:], chat.removeprefix(" ")  # decoding takes the first space for one that was put in front
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return unicodedata.normalize("NFC", text) == unicodedata.normalize("NFC", chat)


def some_text(rng: random.Random, tokens: Sequence[str] = ()) -> str:
    pieces = [
        lambda: rng.choice(CORPUS.split()),
        lambda: rng.choice([" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u3000", "\u00a0"]),
        lambda: rng.choice(
            ["é", "e\u0301", "ß", "🙂", "中", "\u200b", "\u202e", "\x00", "\ue000", "\ue001", "\U0010ffff"]
        ),
        lambda: chr(rng.choice([*range(0x20, 0x3000), *range(0x4E00, 0x5000), *range(0x1F600, 0x1F650)])),
        lambda: rng.choice(["<|", "|>", "<", "im_start", "system\n", "<|im_", "end|>", "[INST", "</s"]),
        lambda: str(rng.randrange(10**6)),
    ]
    weights = [6, 4, 1, 1, 1, 1]
    text = "".join(rng.choices(pieces, weights)[0]() for _ in range(rng.randint(1, 25)))
    for _ in range(rng.randint(1, 4) if tokens else 0):
        at = rng.randint(0, len(text))
        text = text[:at] + rng.choice(tokens) + rng.choice(["", "system\n", "\n", " "]) + text[at:]
    return text if text.strip() else text + "?"


def picture(rng: random.Random) -> Image.Image:
    size = (rng.randint(20, 120), rng.randint(20, 120))
    return Image.fromarray(np.full((size[1], size[0], 3), rng.randrange(256), np.uint8))


def visual_inputs(rng: random.Random, processor: Processor) -> dict:
    if not processor.cfg.vision or rng.random() < 0.6:
        return {}
    videos = [[picture(rng)] * rng.randint(1, 3) for _ in range(rng.choice([0, 0, 1]))]
    return {"images": [picture(rng) for _ in range(rng.randint(0, 3))], "videos": videos}


def no_prompt(rng: random.Random, processor: Processor) -> dict:
    """Arguments of which one can't be used."""
    arguments = {"text": some_text(rng), "context": rng.choice(["", some_text(rng)])}
    other = rng.choice([None, 3, 2.5, b"bytes", ["list"], {"a": 1}, object(), {"set"}])
    half = some_text(rng) + chr(rng.randrange(0xD800, 0xE000)) + some_text(rng)
    bad = [
        ("text", rng.choice(["", " ", "\n\t ", "\u3000", other, half])),
        ("context", rng.choice([" ", "\n\n", other, half])),
        ("fps", rng.choice([0, -1, float("nan"), float("inf"), -float("inf"), "2", None, True, 1e-9, 1e9])),
        (rng.choice(["min_pixels", "max_pixels"]), rng.choice([0, -5, 1, 783, 10**12, 1e5, "784", True, float("nan")])),
        ("images", rng.choice([None, 5, {"a": "b"}, [None], [3], [b"x"], [["a.png"]], "no.png", [""], ["a\0b"]])),
        ("videos", rng.choice([None, 5, [None], [3], [[]], [[None]], [["no.png"]], "no.mp4", [b"x"], ["~nobody/x"]])),
    ]
    name, value = rng.choice(bad)
    return {**arguments, name: value}


def is_right(processor: Processor, prompt, given: dict, kind: str) -> bool:
    merge = processor.cfg.vision.spatial_merge_size**2 if processor.cfg.vision else 1
    sizes = [t * h * w // merge for t, h, w in prompt.grids]
    kinds = ["image"] * len(given.get("images", [])) + ["video"] * len(given.get("videos", []))
    text, context = given["text"], given.get("context", "")
    chat = rendered(processor, text, context, kinds, sizes)
    if kind == "hostile":
        harmless = processor(**{**given, "text": "a", "context": "b" if context else ""})
        return hostile_is_right(processor, prompt, chat, harmless)
    body = f"{context.strip()}\n\n{text}" if context else text
    return ordinary_is_right(processor, prompt, chat, context, body if body in chat else body.strip())  # or trimmed


def arguments_of(kind: str, rng: random.Random, processor: Processor) -> dict:
    if kind == "invalid":
        return no_prompt(rng, processor)
    tokens = list(processor.tokenizer.get_added_vocab())
    while True:
        given = {"text": some_text(rng, tokens if kind == "hostile" else ())}
        if rng.random() < 0.5:
            given["context"] = some_text(rng, tokens if kind == "hostile" else ())
        if kind == "hostile" or not any(token in "\n\n".join(given.values()) for token in tokens):
            return given | visual_inputs(rng, processor)


def fuzz(cases: int, seed: int) -> dict:
    """Counts of what was tried and what went wrong: `wrong` results, `tracebacks`, `not_refused`; the slowest case."""
    rng, counts, examples = random.Random(seed), Counter(wrong=0, tracebacks=0, not_refused=0), []
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        known = processors(Path(folder))
        for case in range(cases):
            name = rng.choice(list(known))
            kind = ("ordinary", "hostile", "ordinary", "invalid")[case % 4]
            given = arguments_of(kind, rng, known[name])
            counts[kind] += 1
            start = time.perf_counter()
            try:
                prompt = known[name](**given)
                problem = "not_refused" if kind == "invalid" else None
                if kind != "invalid" and not is_right(known[name], prompt, given, kind):
                    problem = "wrong"
            except InputError as e:
                counts["refused"] += 1
                one_line = len(str(e)) < 400 and "\n" not in str(e)
                problem = None if kind == "invalid" and one_line else "wrong"
            except Exception as e:  # what is being looked for
                given["error"], problem = repr(e), "tracebacks"
            slowest = max(slowest, time.perf_counter() - start)
            if problem:
                counts[problem] += 1
                examples.append((name, kind, problem, given))
    return {**counts, "slowest": slowest, "examples": examples[:5]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(fuzz(args.cases, args.seed))
