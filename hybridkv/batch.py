"""Many prompts: as many at once as fit, those about the same picture or text from one reading.

Prompts are taken some dozens at a time, as they come, and of these the longest first, so that the cache that is made
for them, and the step that is compiled for it, serve those that follow. Answers are written as they end.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from tqdm import tqdm

from hybridkv import demos
from hybridkv.batch_lines import Answers, Line, read_lines
from hybridkv.cli import can_compile, check_length, one_line, read_text, say
from hybridkv.config import HybridConfig
from hybridkv.engine import Engine
from hybridkv.model import InputError, Processor, Prompt, from_pretrained
from hybridkv.options import weights_dtype, with_profile
from hybridkv.reading import Question, Reading
from hybridkv.sampling import Sampling

AT_ONCE = 16  # prompts in a batch at most
WINDOW = 2 * AT_ONCE  # prompts that are looked at before some of them are asked
ELSEWHERE = ("batch", "out", "memory", "device", "no_compile")  # options that answers do not depend on
TOGETHER = "--batch PROMPTS --out ANSWERS --model NAME go together, and --memory with them"
OUT_OF_MEMORY = "lower --memory or --max-pixels, shorten the context, or use --dtype bfloat16"


@dataclass(frozen=True)
class Job:
    """One line, ready to be asked.

    Attributes:
        heavy: names the pictures and texts it is about: equal for equal ones. "" without any.
        limit: new tokens.
        budget: of its own, which is kept or refused; None for the one of all.
    """

    line: Line
    row: dict
    prompt: Prompt
    heavy: str
    limit: int
    budget: float | None


class Batch:
    """Asks lines with one engine.

    Args:
        options: of every line: `system`, `fps`, `min_pixels`, `max_pixels`.
        new_tokens: of a line that says no other.
        memory: bytes that the caches of the prompts that are asked at once may take together.
        int8: of readings, see `Engine.read`.
        done: called with each line that is answered, or has gone wrong.
    """

    def __init__(
        self,
        engine: Engine,
        processor: Processor,
        answers: Answers,
        options: dict,
        new_tokens: int,
        sampling: Sampling,
        memory: int,
        int8: bool = False,
        done: Callable[[], object] = lambda: None,
    ):
        self.engine, self.processor, self.answers, self.options = engine, processor, answers, options
        self.new_tokens, self.sampling, self.memory, self.int8, self.done = new_tokens, sampling, memory, int8, done
        self.config, self.at_once, self.failed = engine.config, AT_ONCE, 0
        self.last: tuple[str, Reading] | None = None  # the reading that was asked last

    def run(self, lines: list[Line]) -> None:
        self.at_once = min(AT_ONCE, len(lines))
        for first in range(0, len(lines), WINDOW):
            pixels: dict[str, Tensor | None] = {}  # those that are equal are held once
            some = lines[first : first + WINDOW]
            self._ask_all([job for line in some if (job := self._job(line, pixels))])

    def _job(self, line: Line, pixels: dict[str, Tensor | None]) -> Job | None:
        """The line's prompt; None where it can't be made, which is written."""
        try:
            row = line.parse()
            context = row.get("context", "")
            if "context_file" in row:
                context = read_text(row["context_file"])
            prompt = self.processor(
                row.get("messages", row.get("prompt")),
                row.get("images", ()),
                row.get("videos", ()),
                context,
                **self.options | ({"system": row["system"]} if "system" in row else {}),
            )
            limit, budget = row.get("max_new_tokens", self.new_tokens), row.get("budget")
            if budget is not None and self.engine.policy == "full":
                raise InputError('"budget" does not go with --policy full, which keeps everything')
            check_length(prompt, limit, self.processor.cfg.max_position_embeddings)
            heavy = heavy_name(prompt)
            prompt = replace(prompt, patches=pixels.setdefault(heavy, prompt.patches))
            return Job(line, row, prompt, heavy, limit, budget)
        except Exception as e:
            self._fail(line, e)
            return None

    def _fail(self, line: Line, error: Exception, **about: object) -> None:
        message = one_line(error, OUT_OF_MEMORY)
        if message is None:
            raise error
        self.answers.add(line, about | {"error": message})
        self.failed += 1
        self.done()

    def _ask_all(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        longest = max(len(job.prompt.input_ids) + job.limit for job in jobs)
        fit = self.memory // (longest * bytes_of_token(self.engine))
        self.at_once = max(1, min(self.at_once, fit))  # no more again: a batch of another size compiles again
        sizes: dict[str, int] = {}
        for job in jobs:
            sizes[job.heavy] = max(sizes.get(job.heavy, 0), len(job.prompt.input_ids))
        jobs = sorted(jobs, key=lambda job: (-sizes[job.heavy], job.heavy, -len(job.prompt.input_ids)))
        shared = {job.heavy for a, job in enumerate(jobs) if job.heavy and any(j.heavy == job.heavy for j in jobs[:a])}
        jobs.sort(key=lambda job: job.budget or 0)
        for budget, some in groupby(jobs, key=lambda job: job.budget):
            own, alike = {} if budget is None else {"budget": float(budget), "strict": True}, list(some)
            self.engine.config = replace(self.config, **own)
            for first in range(0, len(alike), self.at_once):
                self._ask(alike[first : first + self.at_once], self.engine, shared)

    def _ask(self, jobs: list[Job], engine: Engine, shared: set[str]) -> None:
        """Asks some lines at once; if that can't be, in two halves, and what can't be asked alone has gone wrong."""
        waiting = list(jobs)
        missing = self.at_once - len(jobs) if engine.compile else 0  # filled up: another size would need another graph
        if missing and jobs[-1].heavy:
            shared = shared | {jobs[-1].heavy}  # then what it is filled up with is read once
        try:
            given = [self._given(job, shared) for job in jobs]
            limits = [job.limit for job in jobs]
            given, limits = given + given[-1:] * missing, limits + [1] * missing
            for b, row in ended(engine, given, limits, self.sampling):
                if b < len(jobs):
                    self._write(jobs[b], row)
                    waiting.remove(jobs[b])
        except Exception as e:
            if len(waiting) == 1:
                self._fail(waiting[0].line, e, **named(waiting[0].row))
                return
            if not waiting or one_line(e, "") is None:
                raise
            alone = Engine(engine.model, engine.config, engine.policy, engine.eos, compile=False)
            half = len(waiting) // 2
            self._ask(waiting[:half], alone, shared)
            self._ask(waiting[half:], alone, shared)

    def _given(self, job: Job, shared: set[str]) -> Prompt | Question:
        """The prompt, from a reading if others are about the same; always from one that rounds."""
        if self.last and self.last[0] == job.heavy:
            return Question(job.prompt, self.last[1])
        if not job.heavy or (job.heavy not in shared and not self.int8):
            return job.prompt
        self.last = None  # its memory is for the next one
        self.last = job.heavy, self.engine.read(job.prompt, int8=self.int8)
        return Question(job.prompt, self.last[1])

    def _write(self, job: Job, row: dict) -> None:
        text = self.processor.decode(row["token_ids"])
        tokens = {"prompt_tokens": len(job.prompt.input_ids), "visual_tokens": job.prompt.visual_tokens}
        self.answers.add(job.line, named(job.row) | {"text": text} | row | tokens)
        self.done()


def ended(engine: Engine, given: list, limits: list[int], sampling: Sampling) -> Iterator[tuple[int, dict]]:
    """Which of the prompts has ended, and with which tokens, one after the other."""
    token_ids: list[list[int]] = [[] for _ in given]
    for tokens in engine.stream(given, limits, sampling):
        for b, token in enumerate(tokens):
            if token is None:
                continue
            if token not in engine.eos:
                token_ids[b].append(token)
            if token in engine.eos or len(token_ids[b]) == limits[b]:
                yield b, {"token_ids": token_ids[b], "finished": token in engine.eos}


def named(row: dict) -> dict:
    return {"id": row["id"]} if "id" in row else {}


def heavy_name(prompt: Prompt) -> str:
    """Equal for prompts with the same pictures, videos and contexts; "" for one without any."""
    if not prompt.heavy:
        return ""
    seen = hashlib.sha256(prompt.input_ids[: prompt.heavy].numpy().tobytes())
    if prompt.patches is not None:
        seen.update(prompt.patches.numpy().tobytes())
    return seen.hexdigest()


def bytes_of_token(engine: Engine) -> int:
    """What a token takes in a full cache: the most that it takes in any."""
    cfg = engine.model.cfg
    return 2 * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim * engine.model.dtype.itemsize


def free_memory(device: torch.device) -> int:
    """A quarter of the bytes that are free on a device, or a gigabyte where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (ValueError, AttributeError):  # no Linux
        return 10**9


def answer_lines(args: argparse.Namespace, config: HybridConfig, sampling: Sampling, device: torch.device) -> int:
    """`generate --batch`. Returns how many lines went wrong.

    Raises:
        InputError: the files, or the options beside them, can't be used.
        OSError: a file can't be read or written.
    """
    for name in ("batch", "out"):
        if getattr(args, name) is None:
            raise InputError(f"--{name} is missing: {TOGETHER}")
    others = ("prompt", "context", "demo", "report")
    given = [name for name in others if getattr(args, name) is not None]
    given += [name for name in ("image", "video", "compare", "json") if getattr(args, name)]
    if given:
        raise InputError(f"--{given[0]} does not go with --batch, whose lines bring their own")
    if args.model is None:
        raise InputError(f"--model is missing: {TOGETHER}")
    model_name = demos.MODEL if args.model == "demo" else args.model
    if args.memory is not None and not 0 < args.memory < 1e6:
        raise InputError(f"--memory must be a number of gigabytes above 0, got {args.memory:g}")
    lines = read_lines(args.batch)
    settings = {name: str(value) for name, value in vars(args).items() if value and name not in ELSEWHERE}
    answers = Answers(args.out, lines, json.dumps(settings, sort_keys=True))
    waiting = [line for line in lines if line.number not in answers.done]
    if not waiting:
        say(f"all {len(lines)} lines are answered already")
        return 0
    processor = Processor.from_pretrained(model_name)
    model = from_pretrained(model_name, dtype=weights_dtype(args.dtype, device), device=device)
    args.model = model_name
    config = with_profile(args, config, model, processor)
    engine = Engine(model, config, args.policy, model.cfg.eos_token_id, not args.no_compile and can_compile(device))
    memory = free_memory(device) if args.memory is None else int(args.memory * 1e9)
    options = {name: getattr(args, name) for name in ("fps", "min_pixels", "max_pixels")}
    options["system"] = "" if args.system is None else args.system
    with tqdm(total=len(lines), initial=len(answers.done), desc="answers", unit="line", disable=None) as bar:
        how = (options, args.max_new_tokens, sampling, memory, args.int8_readings)
        batch = Batch(engine, processor, answers, *how, bar.update)
        batch.run(waiting)
    if batch.failed:
        say(f"{batch.failed} of {len(lines)} lines went wrong: {args.out} says why; they are asked again next time")
    return batch.failed
