"""Talk about pictures, videos or a long text: each is read once, and every question is answered from that reading.

Without --model it is the bundled model, which reads boards; without anything to look at, one of its pictures.

examples:
  the bundled model and a board:
    python -m hybridkv.chat
    > Where does V3 point?
    > /image another.png
  a picture, a fifth of the cache:
    python -m hybridkv.chat --model Qwen/Qwen2.5-VL-3B-Instruct --image street.jpg --budget 0.2
  for scripts, a question a line:
    python -m hybridkv.chat --model FOLDER --context report.txt < questions.txt

Lines that begin with a slash are commands; /help lists them, and two slashes begin a question with one. Ctrl-C stops an
answer, Ctrl-D ends. Answers go to stdout, everything else to stderr. On a pipe there is no prompt, and the exit code
is 2 if any line could not be done; the others are done.
"""

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

from tqdm import tqdm

from hybridkv import demos
from hybridkv.cli import Parser, can_compile, choose_device, one_line, one_line_errors, read_text, say
from hybridkv.conversation import Conversation
from hybridkv.engine import Engine
from hybridkv.model import InputError, Processor, from_pretrained
from hybridkv.options import (
    add_answer_options,
    add_cache_options,
    add_input_options,
    cache_config,
    weights_dtype,
    with_profile,
)
from hybridkv.planning.policies import POLICIES
from hybridkv.reading import is_reading
from hybridkv.report import size
from hybridkv.sampling import Sampling
from hybridkv.typed import HISTORY, next_line, typed_lines

OUT_OF_MEMORY = "/reset forgets what was read; smaller pictures (--max-pixels) or --dtype bfloat16 take less"
HELP = """\
/image FILE, /video FILE, /context FILE   read one more of these
/budget B, /policy NAME                   which cache, from the next question on
/stats                                    what the last answer took
/save FILE, /load FILE                    what was read and said, for the same model
/reset                                    forget all but the system prompt
/help, /exit"""


def build_parser() -> Parser:
    parser = Parser("chat", __doc__)
    add_input_options(parser)
    add_cache_options(parser)
    add_answer_options(parser)
    parser.add_argument(
        "--apart",
        action="store_true",
        help="ask each question as if it were the first: what was said is forgotten, what was shown is not",
    )
    parser.add_argument(
        "--no-history",
        action="store_true",
        help=f"don't keep the lines that are typed (else in ${HISTORY}, or hybridkv/chat-history in the state folder)",
    )
    return parser


class Chat:
    """The conversation behind the lines that are typed.

    Attributes:
        tells: whether it says what each answer took.
        took: what the last one took that came to its end; "" if none did.
    """

    def __init__(self, args: argparse.Namespace):
        device = choose_device(args.device)
        self.args, self.sampling = args, Sampling(args.temperature, args.top_p, args.seed)
        config = cache_config(args)
        processor = Processor.from_pretrained(args.model)
        model = from_pretrained(args.model, dtype=weights_dtype(args.dtype, device), device=device)
        config = with_profile(args, config, model, processor)
        compile = not args.no_compile and can_compile(device)
        engine = Engine(model, config, args.policy, model.cfg.eos_token_id, compile)
        look = {"fps": args.fps, "min_pixels": args.min_pixels, "max_pixels": args.max_pixels}
        system = "" if args.system is None else args.system
        self.talk = Conversation(engine, processor, system, look, apart=args.apart, int8=args.int8_readings)
        self.compiling, self.tells, self.took = compile, False, ""
        self.commands: dict[str, Callable[[str], None]] = {
            "image": lambda file: self.show(images=[file]),
            "video": lambda file: self.show(videos=[file]),
            "context": lambda file: self.show(context=read_text(file)),
            "budget": self.budget,
            "policy": self.policy,
            "save": self.save,
            "load": self.load,
        }
        self.plain_commands = {
            "stats": self.stats,
            "reset": self.reset,
            "help": lambda: say(HELP),
            "exit": end,
            "quit": end,
        }

    @property
    def engine(self) -> Engine:
        return self.talk.engine

    def take(self, line: str) -> None:
        """Does what a line says: a command, or a question.

        Raises:
            EOFError: it says that this is the end.
            ValueError, OSError: it can't be done; the conversation goes on.
        """
        if not line.startswith("/") or line.startswith("//"):
            self.ask(line.removeprefix("/"))
            return
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in self.plain_commands:
            if rest:
                raise InputError(f"/{name} takes nothing more, got {rest!r}")
            self.plain_commands[name]()
        elif name in self.commands:
            if not rest:
                raise InputError(f"/{name} wants something after it; /help explains")
            self.commands[name](unquoted(rest))
        else:
            raise InputError(f"there is no command /{name}; /help lists them, and // begins a question with a slash")

    def ask(self, question: str) -> None:
        if self.compiling:
            say("(compiling the decoding step, once for questions of about this size; --no-compile does without)")
            self.compiling = False
        begun = False
        try:
            with closing(self.talk.stream(question, self.args.max_new_tokens, self.sampling)) as pieces:
                for piece in pieces:
                    print(piece, end="", flush=True)
                    begun = True
            begun = True  # an answer without a word is a line, too
        finally:
            if begun:
                print(flush=True)
        self.took = self.account()
        if self.tells:
            self.stats()

    def show(self, **what: object) -> None:
        before = self.talk.read_tokens
        layers = self.engine.model.cfg.num_hidden_layers
        with tqdm(total=layers, desc="reading", unit="layer", leave=False, disable=None) as bar:
            self.talk.show(**what, on_layer=bar.update)
        say(f"({self.talk.read_tokens - before} tokens read, {size(self.read_bytes)} in host memory)")

    @property
    def read_bytes(self) -> int:
        return self.talk.reading.bytes if self.talk.reading else 0

    def budget(self, text: str) -> None:
        try:
            share = float(text)
        except ValueError:
            raise InputError(f"/budget wants a share in (0, 1], got {text!r}") from None
        self.engine.config = replace(self.engine.config, budget=share, strict=True)
        but = "; the full cache keeps everything all the same" if self.engine.policy == "full" else ""
        say(f"(a budget of {share:g} from now on{but})")

    def policy(self, name: str) -> None:
        if name not in POLICIES:
            raise InputError(f"/policy wants one of {', '.join(POLICIES)}, got {name!r}")
        old = self.engine
        if name == "sparsemm" and old.config.head_profile is None:
            raise InputError("sparsemm needs a head profile: start with --head-profile FILE, of hybridkv.calibrate")
        retrieval = "sketch" if old.policy == "quest" else old.config.retrieval
        config = replace(old.config, retrieval=retrieval)
        self.talk.engine = Engine(old.model, config, name, old.eos, old.compile)
        self.compiling = old.compile
        say(f"({name} from now on)")

    def save(self, file: str) -> None:
        if os.path.isfile(file) and not is_reading(file):  # the picture that is talked about, say
            raise InputError(f"{file} is no reading, and stays as it is: name another file")
        self.talk.save(file)
        say(f"(saved to {file}, {size(self.read_bytes)})")

    def load(self, file: str) -> None:
        self.talk.load(file)
        turns = sum(message["role"] == "assistant" for message in self.talk.messages)
        say(f"({self.talk.read_tokens} tokens were read, {turns} questions answered)")

    def reset(self) -> None:
        self.talk.reset()
        say("(all forgotten)")

    def stats(self) -> None:
        if not self.took:
            raise InputError("nothing was answered to its end yet")
        say(self.took)

    def account(self) -> str:
        """What an answer took that has just ended."""
        stats, budget = self.engine.stats, f", budget {self.engine.config.budget:g}"
        used, speed = stats.bytes, "" if stats.ms_per_token is None else f", then {stats.ms_per_token:.1f} ms a token"
        return (
            f"({self.engine.policy}{'' if self.engine.policy == 'full' else budget}: a step reads {size(used.step)} of "
            f"{size(used.full)} ({used.step / used.full:.1%}); {size(used.resident)} on the device, "
            f"{size(self.read_bytes + used.host)} in host memory; first token after {stats.ttft_s:.2f} s{speed})"
        )


def end() -> None:
    raise EOFError


def unquoted(text: str) -> str:
    """A file name as it was meant: in quotation marks, if it was typed so."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return text


def converse(chat: Chat, lines: Callable[[], str], interactive: bool) -> bool:
    """Does line after line until there are no more. Returns whether all could be done."""
    fine = True
    while True:
        line = ""
        try:
            line = lines().strip()
            if line:
                chat.take(line)
        except EOFError:
            return fine
        except KeyboardInterrupt:
            if not interactive:
                raise
            say("(stopped)" if line else "(Ctrl-D ends)")
        except BrokenPipeError:
            raise
        except Exception as e:
            message = one_line(e, OUT_OF_MEMORY)
            if message is None:
                raise
            say(f"error: {message}")
            fine = False


def begin(args: argparse.Namespace) -> Chat:
    """Loads the model, and reads what the options name."""
    shown = bool(args.image or args.video or args.context is not None)
    if args.model is None:
        args.model = "demo"
    if args.model == "demo":
        args.model, args.no_calibration, args.apart = demos.MODEL, True, True
        say("(the bundled model was trained on single questions: each is asked apart)")
        if not shown:
            demo = demos.by_name()[demos.DEFAULT]
            args.image = [str(image) for image in demo.images]
            say(f"(it looks at {args.image[0]}; try: {demo.prompt})")
    context = "" if args.context is None else read_text(args.context)
    chat = Chat(args)
    if args.image or args.video or context:
        chat.show(images=args.image, videos=args.video, context=context)
    return chat


def run(args: argparse.Namespace) -> bool:
    if sys.stdin is None:
        raise InputError("stdin is closed: there is nothing to read questions from")
    interactive = sys.stdin.isatty()
    if interactive and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # somebody types: heeded even if it was ignored
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is said of its line, and is not the end
    chat = begin(args)
    if not interactive:
        return converse(chat, next_line, interactive=False)
    chat.tells = True
    say("(/help lists commands, Ctrl-C stops an answer, Ctrl-D ends)")
    with typed_lines(not args.no_history):
        return converse(chat, lambda: input("> "), interactive=True) or True


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    with one_line_errors(parser, OUT_OF_MEMORY):
        if not run(parser.parse_args(argv)):
            parser.exit(2)


if __name__ == "__main__":
    main()
