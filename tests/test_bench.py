"""The benchmarks of quality and the offline profile, small."""

import json
import re
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import heads, judge, keep_new, layers, long_answers, quality, report
from bench.report import bootstrap
from bench.tasks import TEXT_TASKS, Case, make_case
from demo.tiny_vlm import config as tiny_config
from demo.tiny_vlm import random_model
from hybridkv import Engine, HybridConfig, Prefill, Sampling, calibrate
from hybridkv.demos import MODEL
from hybridkv.model import Processor
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.planning.need import Observer, pruned_tokens
from hybridkv.planning.plan import Plan, budgeted_plan, static_score
from hybridkv.planning.variants import random_heads
from tests.lab import prompt

# bench.quality


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(layers=2, hidden_size=96, heads=6, kv_heads=2, head_dim=16, tie=False))


class Bytes:
    """A processor whose text does not matter."""

    def decode(self, token_ids) -> str:
        return " ".join(map(str, token_ids))


def lab(model) -> judge.Lab:
    return judge.Lab(model, Bytes(), "tiny")


def test_quality_measures_what_the_engine_generates(model):
    """Answers, KL and costs of a variant against a plain generation and a plain softmax."""
    prompts = [prompt(400, 0), prompt(300, 1)]
    config = HybridConfig(budget=0.4, strict=False)
    texts = [Bytes().decode(r.token_ids) for r in Engine(model, config, compile=False).generate(prompts, 12)]
    cases = [Case(p, lambda text, want=want: text == want, 12) for p, want in zip(prompts, texts, strict=True)]
    variants = [judge.Variant("h", "hybridkv", config), judge.Variant("f", "full", config)]
    measured = dict(lab(model).measure(cases, variants))
    assert [row["right"] for row in measured["h"]] == [True, True]
    assert all(row["kl"] > 1e-4 for row in measured["h"])
    assert all(abs(row["kl"]) < 1e-5 for row in measured["f"])
    assert measured["h"][0]["step_bytes"] <= 0.4 * measured["h"][0]["full_bytes"]
    assert measured["f"][1]["attended_tokens"] == 350  # the mean of the batch


def test_a_second_turn_is_fed_through_the_compressed_cache(model):
    """With everything kept, prompt + turn gives the logits of one long prompt."""
    whole = prompt(300, 3)
    turn = whole.input_ids[260:].tolist()
    short = type(whole)(whole.input_ids[:260], whole.prunable[:260], 0, None, [], [])
    config = HybridConfig(budget=1.0)
    bench = lab(model)
    case = Case(short, None, 4, turn)
    tokens, logits = judge.decode(
        Engine(model, config, "full", compile=False), bench.read([case], config), [case], None
    )
    (expected,) = Engine(model, config, "full", compile=False).generate([whole], 4)
    assert tokens[0] == expected.token_ids
    x, positions = model.embed(whole)
    torch.testing.assert_close(logits[0][0], model.logits(model(x, positions))[0, -1], rtol=1e-4, atol=1e-4)


def test_variants_name_policies_and_fields():
    variant = judge.parse_variant("hybridkv:pool=1,dynamic_share=0.25,classifier=random")
    assert (variant.policy, variant.config.pool) == (random_heads, 1)
    assert variant.described() == {**asdict(variant.config), "classifier": "random"}
    assert judge.parse_variant("hybridkv:head_weight=context").described()["head_weight"] == "context"
    assert judge.parse_variant("quest").config.retrieval == "bound"
    named = {text: judge.variants_at(text, [0.1, 0.2], "h.json") for text in ("snapkv", "full", "snapkv:budget=0.3")}
    assert [[(v.name, v.config.budget) for v in each] for each in named.values()] == [
        [("snapkv", 0.1), ("snapkv", 0.2)],
        [("full", 1.0)],
        [("snapkv", 0.3)],
    ]
    (variant,) = judge.variants_at("hybridkv:pool=1,budget=0.3,classifier=profile", [0.1], "h.json")
    assert (variant.name, variant.head_profile) == ("hybridkv:pool=1,classifier=profile", "h.json")


@pytest.mark.parametrize(
    "file",
    [
        *("demo", "demo-again", "demo-layers", "demo-store", "demo-host", "demo-host-share", "qwen"),
        *("smollm2", "smollm2-layers", "smollm2-store", "smollm2-host-share"),
    ],
)
def test_published_rows_are_what_their_commands_would_measure_today(file):
    """A name means the defaults of its day: when they change, rows take other names or are measured again."""
    results = Path(quality.__file__).with_name("results") / f"quality-{file}.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(rows) == len({quality.row_key(row) for row in rows})
    for row in rows:
        budgets, profile = [row["budget"]], row["config"]["head_profile"]
        (variant,) = judge.variants_at(row["policy"], budgets, profile)
        assert variant.name == row["policy"] and json.dumps(variant.described()) == json.dumps(row["config"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("nothing", "no policy"),
        ("snapkv:x=1", "no field 'x'"),
        ("snapkv:pool=2", "pool must"),
        ("snapkv:pool=wide", "pool takes int"),
        ("hybridkv:tiles=yes", "tiles takes bool"),
        ("hybridkv:sketch_rank=high", r"sketch_rank takes int \| None"),
        ("hybridkv:classifier=1", "classifier takes str"),
        ("hybridkv:classifier=guess", "classifier must be one of"),
        ("snapkv:classifier=random", "variant of hybridkv"),
        ("hybridkv:classifier=random,head_weight=context", "goes with no other"),
        ("hybridkv:head_profile=heads.json", "no field 'head_profile'"),
    ],
)
def test_variants_that_make_no_sense_say_why(text, message):
    with pytest.raises(ValueError, match=message):
        judge.parse_variant(text)


def test_the_quality_command_resumes_and_draws(tmp_path, capsys):
    out, picture = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    command = ["--tasks", "lookup", "--tokens", "64", "--samples", "2", "--budgets", "0.5", "--policies", "snapkv"]
    quality.main([*command, "--out", str(out)])
    first = out.read_text()
    quality.main([*command, "hybridkv", "full", "--out", str(out), "--plot", str(picture)])
    assert out.read_text().startswith(first) and picture.stat().st_size > 5000
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["policy"], row["budget"]) for row in rows] == [("snapkv", 0.5), ("hybridkv", 0.5), ("full", 1.0)]
    for row in rows:
        assert row["accuracy_ci"][0] <= row["accuracy"] <= row["accuracy_ci"][1]
        assert row["samples"] == 2 and row["config"]["budget"] == row["budget"]
    assert rows[2]["kl"] < 1e-5 and "tokens/step" in capsys.readouterr().out


def test_a_run_goes_on_behind_its_last_batch_and_to_more_samples(tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    command = ["--tasks", "lookup", "--tokens", "64", "--budgets", "0.5", "--policies", "snapkv", "streaming"]
    command += ["--batch", "1", "--kl-only", "--out", str(out)]
    quality.main([*command, "--samples", "1"])
    prompts = tmp_path / "rows.jsonl.prompts"
    kept = prompts.read_text()
    prompts.write_text(kept + '["cut off while it was wri')
    read = []
    monkeypatch.setattr(quality, "make_case", lambda *args: (read.append(args[-1]), make_case(*args))[1])
    quality.main([*command, "--samples", "3"])
    assert read == [1, 2]  # the first prompt is not read again
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["policy"], row["samples"]) for row in rows] == [
        (policy, samples) for samples in (1, 3) for policy in ("snapkv", "streaming")
    ]
    alone = json.loads(kept.splitlines()[0])[1][0]["kl"]
    assert rows[0]["kl"] == alone != rows[2]["kl"] and rows[2]["accuracy"] is None


def test_head_profiles_are_measured_on_other_prompts(tmp_path, monkeypatch):
    out, file, made = tmp_path / "rows.jsonl", tmp_path / "heads.json", []
    monkeypatch.setattr(quality, "make_case", lambda *args: (made.append(args[1:]), make_case(*args))[1])
    command = ["--tasks", "lookup", "--tokens", "64", "--samples", "1", "--budgets", "0.5", "--kl-only"]
    command += ["--out", str(out), "--head-profile", str(file)]
    quality.main([*command, "--policies", "hybridkv:classifier=profile", "sparsemm", "snapkv"])
    assert made == [("lookup", 64, 5000), ("lookup", 64, 5001), ("lookup", 64, 0)]
    assert HeadProfile.load(file).prompts == 2
    rows = [json.loads(line)["config"]["head_profile"] for line in out.read_text().splitlines()]
    assert rows == [str(file), str(file), None]
    quality.main([*command, "--policies", "hybridkv:classifier=profile"])
    assert len(made) == 3  # neither the profile nor the row is measured again


def test_long_answers_go_on_behind_their_end_and_follow_the_full_cache(tmp_path, capsys, monkeypatch):
    """Everything kept, nothing is lost; of what only the newest tokens are kept, more is lost the longer it gets."""
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(long_answers, "STRETCHES", (32,))
    command = ["--tasks", "lookup", "--tokens", "64", "--samples", "1", "--new-tokens", "60", "--budget", "1"]
    long_answers.main([*command, "--policies", "full", "hybridkv:keep_new=16", "--out", str(out)])
    full, few = map(json.loads, out.read_text().splitlines())
    assert full["stretches"] == [[0, 32], [32, 60]] and len(full["kl"]) == 2
    assert max(full["kl"]) < 1e-4 and full["agrees"] == [1.0, 1.0]
    assert few["kl"][1] > 1e-3 and few["config"]["keep_new"] == 16
    assert few["device_bytes"] < full["device_bytes"]
    assert few["full_bytes"] == pytest.approx(full["full_bytes"])
    assert "hybridkv:keep_new=16" in capsys.readouterr().out


def test_an_answer_in_one_pass_is_what_its_steps_give(model):
    """With no dynamic heads nothing is retrieved, so the pages hold what the mask stands for."""
    given, answer = prompt(300, 5), torch.randint(10, 60, (40,), generator=torch.Generator().manual_seed(0))
    config = HybridConfig(budget=0.4, dynamic_share=0, strict=False)
    bench = lab(model)
    (prefill,) = bench.read([Case(given, None, 1)], config).prefills
    engine = Engine(model, config, compile=False)
    plan = engine.plan(prefill)
    at_once = keep_new.answered(bench, prefill, plan, given, answer)
    full = keep_new.answered(bench, prefill, None, given, answer)
    few = keep_new.answered(bench, prefill, replace(plan, keep_new=8), given, answer)
    read = bench.read([Case(given, None, 1)], config)
    engine.load(read.prefills, len(answer) + 1)
    engine.begin(read.positions, len(answer) + 1, Sampling(), read.first.device)
    steps = []
    with torch.no_grad():
        for token in answer:
            steps.append(model.step(token[None], engine.state.position, engine.cache)[0].log_softmax(-1))
            engine.cache.advance(engine.state.active)
            engine.state.position.add_(engine.state.active)
    torch.testing.assert_close(at_once, torch.stack(steps), rtol=1e-4, atol=1e-4)
    assert (full - at_once).abs().max() > 1e-3  # pruning has lost something
    torch.testing.assert_close(few[:8], at_once[:8], rtol=1e-4, atol=1e-4)
    assert (few[8:] - at_once[8:]).abs().amax(-1).min() > 1e-6


def test_long_answers_are_given_and_cost_what_a_cache_holds(tmp_path, capsys):
    """Bytes by the arithmetic of the cache; a whole model's processor, since the cases are text."""
    processor = Processor.from_pretrained(MODEL)
    for task in keep_new.QUESTIONS:
        case, answer = keep_new.long_case(processor, task, 300, 100, 0)
        assert 50 < len(answer) <= 100 and len(case.input_ids) > 200 and case.prunable.any()
    out = tmp_path / "rows.jsonl"
    command = ["--model", "demo", "--tasks", "copy", "--tokens", "300", "--new-tokens", "100", "--keep-new", "16"]
    keep_new.main([*command, "--budget", "0.9", "--out", str(out)])
    every, few = map(json.loads, out.read_text().splitlines())
    assert (every["keep_new"], few["keep_new"]) == (None, 16)
    assert few["device_bytes"] < every["device_bytes"] and few["full_bytes"] == every["full_bytes"]
    assert len(few["kl"]) == 1 and "keeps    16" in capsys.readouterr().out


def test_rows_become_tables(tmp_path, capsys):
    """A line for each policy and budget, a column for each task; what was not measured stays empty."""

    def row(policy: str, budget: float, task: str, accuracy: float | None, kl: float) -> str:
        costs = {"resident_bytes": 300, "step_bytes": 100, "full_bytes": 1000}
        costs |= {"attended_tokens": 80, "prompt_tokens": 800, "samples": 7}
        answers = {"accuracy": accuracy, "accuracy_ci": accuracy and [0.5, 1.0], "kl": kl, "kl_ci": [kl / 2, kl * 2]}
        about = {"model": "demo", "tokens": 1024, "policy": policy, "budget": budget, "task": task}
        return json.dumps(about | costs | answers)

    file, picture = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    given = [("a", 0.1, "chain", 0.9, 0.25), ("a", 0.1, "prose", None, 0.5), ("b", 0.2, "chain", 0.0, 4.0)]
    file.write_text("\n".join(row(*each) for each in given))
    report.main([str(file), "--plot", str(picture)])
    assert capsys.readouterr().out.splitlines() == [
        "demo, 1024 tokens, 7 prompts a task",
        "",
        "| policy | budget | chain | prose | resident | read a step | tokens a step |",
        "|---|---|---|---|---|---|---|",
        "| `a` | 0.1 | 90%, 0.250 | 0.500 | 30.0% | 10.0% | 10.0% |",
        "| `b` | 0.2 | 0%, 4.000 |  | 30.0% | 10.0% | 10.0% |",
    ]
    assert picture.stat().st_size > 5000
    report.main([str(file), "--policies", "a", "--tasks", "prose", "--intervals"])
    assert "| `a` | 0.1 | 0.250 to 1.000 |" in capsys.readouterr().out
    wrong = {"--budgets 0.3": "no row is left", "--against c": "no rows of c", "--against a": "measure them again"}
    for command, message in (
        *(([str(file), *options.split()], message) for options, message in wrong.items()),
        ([str(tmp_path)], "not JSON lines"),
    ):
        with pytest.raises(SystemExit):
            report.main(command)
        assert message in capsys.readouterr().err


def test_policies_are_compared_prompt_by_prompt():
    """Prompts differ by ten nats, the policies by one on each of them: the interval is of the latter."""
    common = {"model": "m", "task": "t", "tokens": 9, "budget": 0.1, "samples": 20, "full_bytes": 1, "prompt_tokens": 9}
    common |= {"resident_bytes": 1, "step_bytes": 1, "attended_tokens": 1, "accuracy": None}
    each = np.linspace(0, 10, 20)
    noise = np.tile([0.1, -0.1], 10)
    a, b = ({"policy": name, "kl_each": list(kl)} | common for name, kl in (("a", each), ("b", each + 1 + noise)))
    (line,) = report.markdown([b], against=[a]).splitlines()[4:]
    cell = line.split("|")[3]
    mean, low, high = (float(x) for x in re.findall(r"[\d.]+", cell))
    assert mean == 1 and 0.93 < low < 1 < high < 1.07
    assert "| `a` | 0.1 | +0.000 (0.000 to 0.000) |" in report.markdown([a], against=[a])
    assert "| `b` | 0.2 |  |" in report.markdown([b | {"budget": 0.2}], against=[a])  # nothing to compare


def test_intervals_are_over_prompts():
    low, high = bootstrap(np.array([0.0, 1.0] * 20))
    assert 0.3 < low < 0.5 < high < 0.7


def test_text_tasks_hold_their_answers(llama):
    processor = Processor.from_pretrained(llama)
    for task in TEXT_TASKS:
        case, again, other = (make_case(processor, task, 1500, i) for i in (0, 0, 1))
        assert torch.equal(case.prompt.input_ids, again.prompt.input_ids)
        assert case.prompt.input_ids.tolist() != other.prompt.input_ids.tolist()
        assert 1000 < len(case.prompt.input_ids) < 2500 and case.prompt.prunable.float().mean() > 0.7
        text = processor.tokenizer.decode(case.prompt.input_ids)
        assert (case.right is None) == (task in ("prose", "program"))
        if case.right:
            assert not case.right("nothing")
        if task in ("needle", "copy", "second"):  # in the text as in the answer; the others in another order
            assert case.right(text)


# bench.heads, hybridkv.calibrate


def test_need_is_found_where_it_was_planted():
    need = np.array([[0.0, 0.5], [0.0, 0.3]])
    assert heads.agreement(need, np.array([[0, 3], [1, 2]]), 0.5) == (pytest.approx(1.0), 1.0)
    assert heads.agreement(need, np.array([[3, 0], [2, 1]]), 0.5)[1] == 0.0


def test_classifiers_are_held_against_an_offline_profile(tmp_path, monkeypatch, capsys):
    out, file = tmp_path / "row.json", Path(heads.__file__).with_name("results") / "profile-demo.json"
    command = f"heads --task chain --tokens 256 --samples 2 --head-profile {file} --out {out}"
    monkeypatch.setattr("sys.argv", command.split())
    heads.main()
    row = json.loads(out.read_text())
    assert row["need"] == json.loads(file.read_text())["need"] and "base_kl" not in row
    # the model card says so: the heads that chains need rank high by focus, and low by ranks
    assert row["classifiers"]["focus"]["covered"] > 0.9 > row["classifiers"]["ranks"]["covered"]
    assert "covers" in capsys.readouterr().out


def test_layers_of_two_profiles_are_compared(tmp_path, capsys):
    need = torch.tensor([[4.0, 0.0], [0.0, 3.0], [2.0, 0.0], [0.5, 0.5]])
    ours = HeadProfile(need, need)
    theirs = HeadProfile(need[[1, 3, 0, 2]], need)
    assert layers.compared(ours, ours, 0.5) == pytest.approx((2, 2, 0.7, 0.7))
    assert layers.compared(ours, theirs, 0.5) == pytest.approx((1, 2, 0.4, 0.7))  # by need 3 and 1 of 10
    for name, profile in (("ours", ours), ("theirs", theirs)):
        profile.save(tmp_path / name)
    layers.main(["--task-profiles", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")])
    assert "theirs, 0.5 of the layers: 1 of 2 the same, 40% (70%) of the need" in capsys.readouterr().out


def test_the_observer_prunes_one_head_of_each_variant(model):
    """Two steps of every variant against attention written out; 2 layers x 2 KV heads, 3 query heads each."""
    config = HybridConfig(budget=0.3)
    record = Prefill(prompt(300, 0).prunable, config)
    model.prefill(prompt(300, 0), record)
    plan = budgeted_plan(record, torch.zeros(2, 2, dtype=torch.bool), static_score)
    observer = Observer(record, pruned_tokens(record), torch.arange(4))
    assert observer.variants == 5
    q, k, v = torch.randn(2, 5, 6, 1, 16), torch.randn(2, 5, 2, 1, 16), torch.randn(2, 5, 2, 1, 16)
    outs = [observer[1](q[step], k[step], v[step]) for step in range(2)]
    for step, variant, head in np.ndindex(2, 5, 2):
        K = torch.cat([record.layers[1].k[head], *k[: step + 1, variant, head]])
        V = torch.cat([record.layers[1].v[head], *v[: step + 1, variant, head]])
        kept = torch.arange(len(K))
        if variant == 1 + 2 + head:  # of this layer, this head
            pages = int(plan.n_read[1, head]) * plan.page_size
            kept = torch.cat([plan.order(record, 1)[head, :pages], torch.arange(300, len(K))])
            assert len(kept) < 200
        group = slice(3 * head, 3 * head + 3)
        want = torch.softmax(q[step, variant, group, 0] @ K[kept].T / 4, -1) @ V[kept]
        torch.testing.assert_close(outs[step][variant, group, 0], want, rtol=1e-4, atol=1e-5)
    assert observer.visual[0].sum() == 0 and 0 < observer.visual[1].min() <= observer.visual[1].max() < 2


def test_need_is_the_divergence_of_an_answer_with_one_head_pruned(model):
    """Against the paged cache under plans that prune one head and keep the others whole."""

    def prune_one(layer: int, head: int, prefill: Prefill) -> Plan:
        plan = budgeted_plan(prefill, torch.zeros(2, 2, dtype=torch.bool), static_score)
        pages = torch.full_like(plan.n_read, plan.whole_pages)
        pages[layer, head] = plan.n_read[layer, head]
        return replace(plan, n_read=pages)

    config, case = HybridConfig(budget=0.3, strict=False), Case(prompt(300, 0), None, 7)
    variants = [judge.Variant(str(at), partial(prune_one, *at), config) for at in np.ndindex(2, 2)]
    kl = [rows[0]["kl"] for _, rows in lab(model).measure([case], variants, answers=False)]
    need = calibrate.calibrate(model, [case.prompt], config, model.cfg.eos_token_id, 6).need
    assert min(kl) > 1e-5
    torch.testing.assert_close(need.flatten(), torch.tensor(kl), rtol=1e-2, atol=1e-6)


def test_a_profile_is_measured_saved_and_used(model, tmp_path):
    profile = calibrate.calibrate(model, [prompt(300, 0), prompt(280, 1)], HybridConfig(budget=0.3), (), 6, "tiny")
    assert profile.prompts == 2 and profile.need.shape == (2, 2) and (profile.need > 0).all()
    file = tmp_path / "heads.json"
    profile.save(file)
    again = HeadProfile.load(file)
    assert torch.equal(again.need, profile.need) and torch.equal(again.visual, profile.visual)
    config = HybridConfig(budget=0.4, classifier="profile", head_profile=again)
    engine = Engine(model, config, compile=False)
    engine.generate([prompt(500, 0)], 3)
    assert engine.stats.dynamic_heads == 1


NUMBERS = [[0.1, 0.2], [0.3, 0.4]]


@pytest.mark.parametrize(
    "row, message",
    [
        (None, "not a head profile"),
        ([], "not a head profile"),
        ({"need": NUMBERS, "visual": NUMBERS, "prompts": 1}, "lacks 'model'"),
        ({"need": NUMBERS, "visual": NUMBERS[0], "prompts": 1, "model": ""}, "visual must be a table"),
        ({"need": [[0.1], [0.2, 0.3]], "visual": NUMBERS, "prompts": 1, "model": ""}, "not a head profile"),
        ({"need": [], "visual": [], "prompts": 1, "model": ""}, "need must be a table"),
        ({"need": [[0.1, float("inf")]], "visual": [[1, 1]], "prompts": 1, "model": ""}, "finite"),
        ({"need": [[0.1, -1]], "visual": [[1, 1]], "prompts": 1, "model": ""}, "not negative"),
        ({"need": [["a", "b"]], "visual": [[1, 1]], "prompts": 1, "model": ""}, "not a head profile"),
        ({"need": NUMBERS, "visual": NUMBERS, "prompts": None, "model": ""}, "not a head profile"),
    ],
)
def test_files_that_are_no_head_profile_say_why(row, message, tmp_path):
    file = tmp_path / "heads.json"
    if row is not None:
        file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        HeadProfile.load(file)


def test_the_calibrate_command(vlm, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (448, 448), "teal").save(tmp_path / "a.png")
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"prompt": "What is it?", "images": [str(tmp_path / "a.png")]}) + "\n")
    out = tmp_path / "heads.json"
    command = ["--model", str(vlm), "--out", str(out), "--budget", "0.5", "--new-tokens", "4"]
    calibrate.main([*command, "--prompts", str(samples)])
    assert "2 layers x 2 KV heads, 1 prompts" in capsys.readouterr().out
    assert HeadProfile.load(out).prompts == 1
    for bad, message in (([], "--prompts is missing"), (["--prompts", str(out)], 'with a "prompt"')):
        with pytest.raises(SystemExit):
            calibrate.main([*command, *bad])
        assert message in capsys.readouterr().err
