"""lmms-eval: requests become answers, MileBench's scores are its own, results become a table; and, where lmms-eval is
installed (bench/lmms.sh), all of it end to end on boards."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BatchFeature, Qwen2_5_VLForConditionalGeneration

from bench import leaderboard
from demo import boards as bd
from hybridkv import Engine, HeadProfile, HybridConfig, demos
from hybridkv.lmms.answer import Costs, Generation, answer, batches, our_messages
from hybridkv.lmms.answer_hf import answer_hf
from hybridkv.model import InputError, Processor, from_pretrained
from hybridkv.profiles import brought_profile
from tests import lmms_data
from tests.test_parity import reference_inputs

ROOT = Path(__file__).parent.parent
TASKS = ROOT / "bench" / "lmms_tasks"
has_lmms = importlib.util.find_spec("lmms_eval") is not None


def milebench_utils(folder: Path):
    """The tasks' functions, reading a folder, as lmms-eval loads them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MILEBENCH", str(folder))
        spec = importlib.util.spec_from_file_location("milebench_utils", TASKS / "milebench" / "utils.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


# ---- scores ----

# Answers, and what MileBench's own evaluate.py (commit 730e930, with rouge 1.0.1) scores them.
OPEN = [
    ("The red car turned left.", "The red car turned left.", 0.999999995),
    ("A red car has turned to the left", "the red car turned left", 0.6153846106508877),
    ("the the the car", "the car", 0.999999995),
    ("left turned car red the", "the red car turned left", 0.19999999500000015),
    ("It costs 3.5 dollars. Or not?", "3.5 dollars it costs", 0.8333333284722222),
    ("There is, for example, nothing.", "there is nothing", 0.7499999953125),
    ("Well\nnew\tline (two)", "well new line two", 0.999999995),
    ("U.S. flag, 1,000 times!", "us flag 1000 times", 0.999999995),
    ("", "something", 0.0),
    ("...", "something", 0.0),
]
CHOICES = ["a red car", "a blue car", "no car (at all)", "C"]
CHOICE = [
    ("A. a red car", "a red car", 1.0),
    ("B", "a blue car", 1.0),
    ("The answer is a blue car.", "a blue car", 1.0),
    ("no car at all", "no car (at all)", 1.0),
    ("", "no car (at all)", 1.0),
    ("a red car, not a blue car", "a blue car", 0.0),
    ("I do not know", "a red car", 0.0),
]
SAID = [("It is Paris, I think", "Paris", 1.0), ("Parisian", "paris", 1.0), ("London", "Paris", 0.0)]


def test_scores_are_milebenchs(tmp_path):
    score = milebench_utils(tmp_path).score
    for given, right, expected in OPEN:
        assert score("open-ended", given, right) == pytest.approx(expected, abs=1e-12), given
    for given, right, expected in CHOICE:
        assert score("multi-choice", given, right, list(CHOICES)) == expected, given
    for given, right, expected in SAID:
        assert score("said", given, right) == expected, given


def test_a_right_answer_that_is_no_choice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none of the choices"):
        milebench_utils(tmp_path).score("multi-choice", "a", "z", ["x", "y"])


def test_every_subset_of_the_paper_is_a_task(tmp_path):
    utils = milebench_utils(tmp_path)
    group = (TASKS / "milebench" / "_milebench.yaml").read_text()
    for key, subset in utils.SUBSETS.items():
        text = (TASKS / "milebench" / f"milebench_{key}.yaml").read_text()
        assert f"utils.files_{key}" in text and f"utils.docs_{key}" in text and f"milebench_{key}\n" in text
        assert f"- milebench_{key}\n" in group
        assert getattr(utils, f"files_{key}")["data_files"]["test"] == str(tmp_path / subset / f"{subset}.json")
    assert len(utils.SUBSETS) == 8 == len(list((TASKS / "milebench").glob("milebench_*.yaml")))


class Docs(list):
    """As much of a data set as `process_docs` needs."""

    def map(self, complete):
        return Docs(doc | complete(doc) for doc in self)


def docs(utils, key: str) -> list[dict]:
    file = getattr(utils, f"files_{key}")["data_files"]["test"]
    return getattr(utils, f"docs_{key}")(Docs(json.loads(Path(file).read_text())["data"]))


def test_pictures_stand_where_their_number_says(tmp_path):
    folder = tmp_path / "WebQA" / "images"
    folder.mkdir(parents=True)
    for n, colour in enumerate(("red", "green", "blue"), 1):
        Image.new("RGB", (56, 56), colour).save(folder / f"{n}.png")
    instance = {"context": "First {image#2} then {table#1}.", "images_path": ["1.png", "2.png", "3.png"]}
    instance["choice_list"] = ["yes", "no"]
    sample = {"sample_id": 0, "task_instruction_id": 1, "task_instance": instance, "response": "no"}
    about = {"task_instruction": ["wrong", "Look."], "question_type": "multi-choice"}
    (tmp_path / "WebQA" / "WebQA.json").write_text(json.dumps({"meta_data": about, "data": [sample]}))
    utils = milebench_utils(tmp_path)
    (doc,) = docs(utils, "webqa")
    ((message),) = utils.doc_to_messages(doc)
    seen = [p["text"] if p["type"] == "text" else p["url"].getpixel((0, 0)) for p in message["content"]]
    red, green, blue = (255, 0, 0), (0, 128, 0), (0, 0, 255)
    tail = ".\nChoice list: \nA. yes\nB. no\nYour answer is: "
    assert seen == [blue, "Look.\nFirst ", green, " then ", red, tail]
    assert utils.doc_to_text(doc) == f"Look.\nFirst <Image 2>  then <Image 1> {tail}"
    assert utils.process_results(doc, ["B. no"]) == {"milebench": 1.0}


# ---- requests ----


def test_generation_arguments():
    how = Generation.of({"max_new_tokens": 7, "temperature": 0.5, "do_sample": True, "top_p": 0.9, "until": "\n\n"})
    assert (how.max_new_tokens, how.sampling.temperature, how.sampling.top_p) == (7, 0.5, 0.9)
    assert how.cut(" one\n\ntwo") == "one" and Generation(until=("x", "b")).cut("abcx") == "a"
    greedy = Generation.of({"temperature": 1.0, "do_sample": False, "top_p": None, "num_beams": 1})
    assert greedy == Generation()
    with pytest.raises(InputError, match="beam"):
        Generation.of({"num_beams": 4})


def test_messages_that_can_not_be_answered_are_refused():
    for part in ({"type": "audio", "url": "a.wav"}, {"type": "video", "url": "a.mp4", "start_time": 1.0}):
        with pytest.raises(InputError):
            our_messages([{"role": "user", "content": [part]}])


@cache
def bundled():
    model = from_pretrained(demos.MODEL, dtype=torch.float32, progress=False)
    return model, Processor.from_pretrained(demos.MODEL)


def engine(policy: str, budget: float, profile: HeadProfile | None = None) -> Engine:
    config, model = HybridConfig(budget=budget, strict=False, head_profile=profile), bundled()[0]
    return Engine(model, config, policy, model.cfg.eos_token_id, compile=False)


@pytest.fixture(scope="module")
def boards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("milebench")
    lmms_data.milebench(folder)
    return folder


def our_scores(boards: Path, policy: str, budget: float) -> dict[str, list[float]]:
    """The scores of our own engine's answers, each prompt made by hand."""
    profile = brought_profile(demos.MODEL) if policy == "hybridkv" else None
    utils, running = milebench_utils(boards), engine(policy, budget, profile)
    scores = {}
    for key in ("clevr_change", "webqa", "mmcoqa"):
        scores[f"milebench_{key}"] = []
        for doc in docs(utils, key):
            _, processor = bundled()
            text = utils.PLACE.sub("", utils.text_of(doc)).lstrip()
            asked = processor([{"role": "user", "content": [{"type": "image", "image": path} for path in doc["paths"]]
                                + [{"type": "text", "text": text}]}])  # fmt: skip
            (result,) = running.generate([asked], 512)
            said = processor.decode(result.token_ids)
            scores[f"milebench_{key}"].append(utils.process_results(doc, [said])["milebench"])
    return scores


def test_answers_are_those_of_the_engine_and_costs_are_counted(boards):
    utils, costs, running = milebench_utils(boards), Costs(), engine("hybridkv", 0.2)
    asked = docs(utils, "clevr_change")
    for messages in map(utils.doc_to_messages, asked):
        ((text, tokens),) = answer(running, bundled()[1], [messages], Generation(), costs)
        assert text == utils.doc_to_target(asked[costs.prompts - 1]) and tokens == 3
    shares = costs.shares()
    assert costs.prompts == 3 and costs.tokens == 9
    assert 0 < shares["step_share"] < shares["resident_share"] < 1
    assert shares["resident_bytes"] == costs.resident / 3
    assert Costs().shares() == {}


def about(picture: object, text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "url": picture}, {"type": "text", "text": text}]}]


def test_questions_about_one_picture_share_a_reading(monkeypatch):
    one, other = (bd.make_sample("test", i, "lookup", 12, 12) for i in (0, 1))
    keys = [q.text for q in (one.question, other.question)]
    asked = [about(one.images[0], keys[0]), about(one.images[0].copy(), keys[1]), about(one.images[0], "Follow a.")]
    asked += [about(other.images[0], keys[1]), [{"role": "user", "content": [{"type": "text", "text": keys[0]}]}]]
    asked += [about(other.images[0], keys[1])]
    assert [(shared, len(group)) for shared, group in batches(iter(asked), 2)] == [(True, 3), (False, 2), (False, 1)]
    running, read = engine("hybridkv", 0.3), []
    reading = Engine.read
    monkeypatch.setattr(Engine, "read", lambda self, prompt: read.append(prompt) or reading(self, prompt))
    costs, how = Costs(), Generation(8)
    together = list(answer(running, bundled()[1], iter(asked), how, costs, size=2))
    alone = [next(answer(running, bundled()[1], [messages], how, Costs())) for messages in asked]
    assert together == alone and len(read) == 1 and costs.prompts == 6
    assert together[0][0] == one.question.answer


class TheirProcessor:
    """A processor of transformers, as far as it is used, for the bundled model; its own wants torchvision."""

    def __init__(self):
        self.model, self.ours = bundled()

    def apply_chat_template(self, conversations: list, padding: bool, **how) -> BatchFeature:
        rows = [reference_inputs(self.model, self.ours(messages)) for messages in conversations]
        longest = max(row["input_ids"].shape[1] for row in rows)
        inputs = {}
        for name in rows[0]:
            parts = [row[name] for row in rows]
            if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                parts = [torch.nn.functional.pad(part, (longest - part.shape[1], 0)) for part in parts]
            inputs[name] = torch.cat(parts)
        return BatchFeature(inputs)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self.ours.decode(ids)


def test_the_adapter_answers_as_our_engine_does():
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(demos.MODEL, dtype=torch.float32).eval()
    model.set_attn_implementation("hybridkv")
    samples = [bd.make_sample("test", i, "lookup", 12, 12) for i in range(3)]
    asked = [about(sample.images[0], sample.question.text) for sample in samples]
    costs, how = [Costs(), Costs()], Generation(8)
    theirs = list(answer_hf(model, TheirProcessor(), iter(asked), how, costs[0], 2, budget=0.4, strict=False))
    ours = list(answer(engine("hybridkv", 0.4), bundled()[1], iter(asked), how, costs[1], 2))
    assert theirs == ours and [text for text, _ in ours] == [sample.question.answer for sample in samples]
    assert costs[0].step == costs[1].step and costs[0].tokens == costs[1].tokens


# ---- end to end, where lmms-eval is ----


@pytest.mark.skipif(not has_lmms, reason="lmms-eval is not installed: bench/lmms.sh makes an environment with it")
@pytest.mark.parametrize("policy, budget", [("full", 1.0), ("hybridkv", 0.2), ("snapkv", 0.2)])
def test_lmms_eval_scores_as_our_engine_does(boards, tmp_path, policy, budget):
    home, local, out = tmp_path / "home", tmp_path / "tasks", tmp_path / "out"
    lmms_data.nextqa(home, local / "nextqa")
    shutil.copytree(TASKS / "milebench", local / "milebench")
    expected = our_scores(boards, policy, budget)
    names = [*expected, "nextqa_local"]
    command = [sys.executable, "-m", "lmms_eval", "--model", "hybridkv", "--tasks", ",".join(names), "--log_samples"]
    command += ["--model_args", f"pretrained={demos.MODEL},policy={policy},budget={budget},compile=False"]
    command += ["--include_path", str(local), "--output_path", str(out)]
    offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "MILEBENCH": str(boards)}
    done = subprocess.run(
        command, env=os.environ | offline, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT
    )
    (file,) = out.rglob("*_results.json") if out.exists() else [None]
    assert file, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(file.read_text())
    for task, scores in expected.items():
        assert found["results"][task]["milebench,none"] == pytest.approx(sum(scores) / len(scores), abs=1e-9)
    assert found["results"]["nextqa_local"]["exact_match,none"] in (0, 1 / 3, 2 / 3, 1)
    (line,) = leaderboard.read([file])
    assert line.name == ("full" if policy == "full" else f"{policy} {budget}") and set(names) <= {
        task.split(" ")[0] for task in line.scores
    }
    print(leaderboard.markdown([line]))


@pytest.mark.skipif(not has_lmms, reason="lmms-eval is not installed: bench/lmms.sh makes an environment with it")
def test_both_models_are_found_and_answer_alike(monkeypatch):
    from lmms_eval.models import get_model

    from hybridkv.lmms import adapter

    processor = TheirProcessor()
    processor.tokenizer = type("Tokenizer", (), {})()
    monkeypatch.setattr(adapter.AutoProcessor, "from_pretrained", lambda name: processor)
    sample, answers = bd.make_sample("test", 0, "lookup", 12, 12), []
    for name in ("hybridkv", "hybridkv_hf"):
        model = get_model(name)(str(demos.MODEL), budget=0.4, device="cpu", compile=False)
        costs = Costs()
        answers.append(list(model.answer([about(sample.images[0], sample.question.text)], Generation(8), costs)))
        assert 0 < costs.shares()["step_share"] <= 0.4
    assert answers[0] == answers[1] == [(sample.question.answer, 2)]
    assert processor.tokenizer.padding_side == "left"


# ---- leaderboard ----


def results(policy: str, budget: float, scores: dict, resident: float | None, model: str = "hybridkv") -> dict:
    """As much of a result file as is read."""
    return {
        "config": {"model": model, "model_args": f"pretrained=x,policy={policy},budget={budget},fps=2.0"},
        "results": {
            task: {"alias": task, f"{metric},none": value, f"{metric}_stderr,none": 0.1}
            for task, (metric, value) in scores.items()
        },
        "throughput": {} if resident is None else {"avg_resident_share": resident, "avg_step_share": 0.1},
    }


@pytest.fixture
def board_files(tmp_path) -> Path:
    folder = tmp_path / "results" / "model"
    folder.mkdir(parents=True)
    a, b = ("milebench", 0.5), ("exact_match", 0.75)
    for n, row in enumerate(
        [
            results("full", 1.0, {"milebench_webqa": a, "nextqa_mc_test": b}, 1.01),
            results("hybridkv", 0.1, {"milebench_webqa": ("milebench", 0.1)}, 0.3),
            results("hybridkv", 0.1, {"milebench_webqa": ("milebench", 0.25)}, 0.2),
            results("", 0, {"milebench_webqa": a}, None, model="qwen2_5_vl"),
        ]
    ):
        (folder / f"2026010{n}_results.json").write_text(json.dumps(row))
    return tmp_path / "results"


def test_leaderboard(board_files, tmp_path, capsys):
    leaderboard.main([str(board_files)])
    assert capsys.readouterr().out.splitlines() == [
        "| cache | milebench_webqa | nextqa_mc_test (exact_match) | mean | resident | read a step |",
        "| --- | --- | --- | --- | --- | --- |",
        "| `full fps=2.0` | 0.500 | 0.750 | 0.500 | 101.0% | 10.0% |",
        "| `hybridkv 0.1 fps=2.0` | 0.250 | - | 0.250 | 25.0% | 10.0% |",
        "| `qwen2_5_vl` | 0.500 | - | 0.500 | - | - |",
    ]
    pytest.importorskip("matplotlib")
    leaderboard.main([str(board_files), "--plot", str(tmp_path / "a.png")])
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 500


def test_leaderboard_refuses_what_is_no_result(tmp_path, capsys):
    (tmp_path / "x_results.json").write_text("[]")
    for place, message in ((tmp_path / "none", "holds no"), (tmp_path, "not a result file")):
        with pytest.raises(SystemExit) as stop:
            leaderboard.main([str(place)])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    config = {"config": {"model": "hybridkv"}}
    for wrong in ({"results": {"a": 5}}, {"results": {}, "throughput": 5}):
        (tmp_path / "x_results.json").write_text(json.dumps(config | wrong))
        with pytest.raises(SystemExit) as stop:
            leaderboard.main([str(tmp_path)])
        assert stop.value.code == 2 and "not a result file" in capsys.readouterr().err
