"""The page on what a cache kept and fetched: what was written down is true, the page says it, and nothing else runs."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from demo import boards as bd
from demo.pictures import DEMOS
from demo.tiny_vlm import config as tiny_config
from demo.tiny_vlm import random_model
from hybridkv import Engine, HybridCache, HybridConfig, Prefill, demos, generate
from hybridkv.html import Run, page
from hybridkv.html.prompt import pictures, pieces
from hybridkv.model import Processor, from_pretrained
from tests.lab import chunks_of, fixed_of, prompt

ATTACK = "</script><script>alert('x')</script><img src=x onerror=alert(1)>&amp;\u2028"


def data_of(html: str) -> dict:
    """What the page's script draws from."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def members(bitmap: str) -> list[int]:
    bits = np.unpackbits(np.frombuffer(base64.b64decode(bitmap), np.uint8), bitorder="little")
    return bits.nonzero()[0].tolist()


class Watched(HybridCache):
    """Finds by the keys themselves which chunks a step needs: `steps` has a dict for each, of each dynamic head."""

    steps: list[dict]

    def attend(self, layer, nth, pool, q, k, v):
        if nth is not None:
            if int(nth) == 0:
                self.steps.append({})
            group = q.shape[1] // self.heads
            for head in range(self.heads):
                if pages := chunks_of(self, int(layer), head):
                    self.steps[-1][int(layer), head] = self.mass(q[0, head * group : (head + 1) * group, 0], pages)
        return super().attend(layer, nth, pool, q, k, v)

    def mass(self, q, pages: list[int]):
        """Attention on each chunk, mean over the group: q (G, D) -> (C,)."""
        keys = self.pools[0].keys.view(-1, self.page_size, q.shape[-1])[pages]  # (C, S, D)
        score = torch.einsum("gd,csd->gcs", q.double(), keys.double()) * q.shape[-1] ** -0.5
        return score.flatten(1).softmax(1).view_as(score).sum(2).mean(0)


@pytest.fixture(scope="module")
def chain():
    """The bundled model follows pointers, with every key at hand to choose chunks by; recorded and watched."""
    demo = demos.by_name()["chain"]
    model = from_pretrained(demos.MODEL, dtype=torch.float32, progress=False)
    processor = Processor.from_pretrained(demos.MODEL)
    asked = processor(demo.prompt, images=demo.images)
    engine = Engine(
        model, HybridConfig(budget=0.2, retrieval="exact"), eos=model.cfg.eos_token_id, compile=False, record=True
    )
    Watched.steps = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("hybridkv.engine.HybridCache", Watched)
        (result,) = engine.generate([asked], 20)
    assert processor.decode(result.token_ids).strip() == demo.answer
    return engine, processor, asked, result.token_ids


def test_the_page_shows_the_chunks_that_each_word_needed(chain):
    engine, processor, asked, token_ids = chain
    run = data_of(engine.report(processor, asked, token_ids))["runs"][0]
    (record,) = engine.cache.recording.records
    assert len(run["retrieved"]) == len(token_ids) - 1 <= len(Watched.steps)
    dynamic = {tuple(head) for head in record.plan.dynamic.nonzero().tolist()}
    for shown, masses in zip(run["retrieved"], Watched.steps, strict=False):
        assert {tuple(map(int, name.split(","))) for name in shown} == set(masses) == dynamic
        for name, bitmap in shown.items():
            layer, head = map(int, name.split(","))
            mass, chosen = masses[layer, head], members(bitmap)
            assert len(chosen) == int(record.plan.n_retrieve[layer, head])
            others = sorted(set(range(len(mass))) - set(chosen))
            assert mass[chosen].min() >= mass[others].max() - 1e-5  # scored in float32 there


def test_the_cell_that_the_next_word_stands_in_is_among_them(chain):
    engine, processor, asked, token_ids = chain
    data = data_of(engine.report(processor, asked, token_ids))
    (_, task, rows, cols, n, seed), run, (start, *_) = DEMOS["chain"], data["runs"][0], asked.spans[0]
    rng = bd.rng_for("demo", seed)
    question = bd.ask(rng, bd.make_boards(rng, n, rows, cols), task)
    assert [piece.strip() for piece in run["answer"]] == question.answer.split()
    for (_, r, c), shown in zip(question.evidence, run["retrieved"], strict=False):
        fetched = {t for bitmap in shown.values() for chunk in members(bitmap) for t in run["chunks"][chunk]}
        assert start + r * cols + c in fetched


def test_what_static_heads_are_said_to_keep_lies_in_their_pages(chain):
    engine, processor, asked, token_ids = chain
    run = data_of(engine.report(processor, asked, token_ids))["runs"][0]
    cache, plan, seen = engine.cache, engine.cache.recording.records[0].plan, Prefill(asked.prunable, engine.config)
    engine.model.prefill(asked, seen)
    for layer, head in [*(~plan.dynamic).nonzero()[::5].tolist(), *plan.dynamic.nonzero()[:2].tolist()]:
        kind, tokens = run["kinds"][layer][head], run["kept"][layer][head]
        assert kind == ("dynamic" if plan.dynamic[layer, head] else "static")
        pages = fixed_of(cache, layer, head)
        keys = cache.pools[0].keys
        stored = keys.view(-1, cache.page_size, keys.shape[-1])
        if kind == "static":
            tokens, pages = members(tokens), pages[: int(plan.n_read[layer, head])]
        else:
            assert tokens is None
            pages = chunks_of(cache, layer, head)[: plan.lane_chunks]
            tokens = [t for chunk in run["chunks"][: plan.lane_chunks] for t in chunk]
        torch.testing.assert_close(stored[pages].flatten(0, 1), seen.layers[layer].k[head][tokens])
        assert run["pages"][layer][head] == int(plan.n_read[layer, head])


def test_the_picture_is_the_one_that_the_model_saw(chain):
    _, processor, asked, _ = chain
    with Image.open(demos.by_name()["chain"].images[0]) as given:
        ((shown,),) = pictures(processor, asked)
        assert np.array_equal(np.asarray(shown), np.asarray(given.convert("RGB")))


def test_size_and_no_requests(chain):
    engine, processor, asked, token_ids = chain
    html = engine.report(processor, asked, token_ids)
    assert len(html.encode()) < 2_000_000
    assert "default-src 'none'" in html and "<link" not in html
    assert set(re.findall(r"https?://[^\"' ]+", html)) == {"http://www.w3.org/2000/svg"}  # a name, not a request
    assert all(uri.startswith("data:") for uri in re.findall(r'(?:src|href)="([^"]*)"', html))


@pytest.fixture(scope="module")
def tiny(vlm):
    return from_pretrained(vlm, dtype=torch.float32, progress=False), Processor.from_pretrained(vlm)


def recorded(tiny, asked, policy: str = "hybridkv", new_tokens: int = 6, **config) -> Engine:
    engine = Engine(tiny[0], HybridConfig(strict=False, **config), policy, compile=False, record=True)
    engine.generate([asked] if not isinstance(asked, list) else asked, new_tokens)
    return engine


def test_text_of_all_kinds_stays_text(tiny):
    _, processor = tiny
    asked = processor(ATTACK, images=[Image.new("RGB", (336, 336), "teal")], context=ATTACK * 20)
    engine = recorded(tiny, asked, budget=0.5)
    attack_ids = processor(ATTACK).input_ids.tolist()
    html = page(processor, asked, [Run.of(engine, attack_ids)])
    assert html.count("</script>") == 2 and "<img" not in html and "alert('x')</script" not in html
    data = data_of(html)
    assert "".join(data["runs"][0]["answer"]) == processor.decode(attack_ids)
    text = "".join(piece for run in data["texts"] for piece in run["pieces"])
    assert text.count("<script>alert('x')</script>") == 21
    assert "&lt;script&gt;" in html  # the answer for who has no JavaScript


def test_long_text_and_video(tiny):
    _, processor = tiny
    frames = [Image.new("RGB", (112, 84), (40 * i, 0, 99)) for i in range(6)]
    asked = processor("What grew?", videos=[frames], context="The cache grew ä and grew. 🦜 " * 30)
    data = data_of(recorded(tiny, asked, budget=0.5).report(processor, asked, [1, 2, 3]))
    (video,) = data["inputs"]
    assert len(video["frames"]) == asked.spans[0][1] == 3 and len(set(video["frames"])) == 3
    assert data["tokens"] == len(asked.input_ids)
    covered = sum(len(run["pieces"]) for run in data["texts"]) + len(video["frames"]) * video["h"] * video["w"]
    assert covered == data["tokens"]
    assert "".join(data["texts"][1]["pieces"]).count("The cache grew ä and grew. 🦜") == 30


def test_pieces_join_to_the_text(tiny):
    _, processor = tiny
    text = "für 🦜 and\n\n  spaces, " * 9
    ids = processor(text).input_ids
    assert "".join(pieces(processor, ids)) == processor.decode(ids)


@pytest.mark.parametrize("policy", ["full", "snapkv", "quest"])
def test_other_policies(tiny, policy):
    asked = prompt(400, 0)
    engine = recorded(tiny, asked, policy, budget=0.4)
    (record,), plan = engine.cache.recording.records, engine.cache._plans[0]
    assert len(record.retrieved) == 5
    assert all(set(step) == {tuple(h) for h in plan.dynamic.nonzero().tolist()} for step in record.retrieved)
    assert [[len(t) for t in layer] for layer in record.kept] == torch.where(
        plan.dynamic | plan.whole, plan.tokens, plan.n_read * plan.page_size
    ).tolist()


def test_each_prompt_of_a_batch_has_its_own_record(tiny):
    prompts = [prompt(400, 0), prompt(300, 1)]
    together = recorded(tiny, prompts, budget=0.4).cache.recording.records
    for one, asked in zip(together, prompts, strict=True):
        (alone,) = recorded(tiny, asked, budget=0.4).cache.recording.records
        assert torch.equal(one.plan.n_read, alone.plan.n_read)
        for a, b in zip(one.retrieved, alone.retrieved, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[head], b[head]) for head in a)


def test_closed_tail_pages_are_chunks_with_what_is_left_of_the_prompt(tiny):
    asked = prompt(400 + 5, 0)
    engine = recorded(tiny, asked, new_tokens=40, budget=0.9, dynamic_share=1.0)
    (record,) = engine.cache.recording.records
    head = next(iter(record.retrieved[-1]))
    tokens = torch.cat([record.chunk_tokens(head, c) for c in range(record.plan.lane_chunks + 2)])
    assert len(record.chunk_tokens(head, record.plan.lane_chunks)) == 405 % 16
    assert len(tokens) == len(set(tokens.tolist())) == 405 - record.plan.always_pages * 16
    assert max(int(step[head].max()) for step in record.retrieved) >= record.plan.lane_chunks


def test_without_a_report_there_is_nothing_of_it(tiny):
    model, processor = tiny
    engine, with_it = (Engine(model, HybridConfig(budget=0.4), compile=False, record=r) for r in (False, True))
    answers = [e.generate([prompt(400, 0)], 6)[0].token_ids for e in (engine, with_it)]
    assert answers[0] == answers[1]
    assert engine.cache.recording is None
    buffers = [{name for name, _ in e.cache.named_buffers()} for e in (engine, with_it)]
    assert buffers[1] - buffers[0] == {"recording.chosen"}
    assert engine.stats.bytes == with_it.stats.bytes  # what is written down is no cache
    with pytest.raises(ValueError, match="record=True"):
        engine.report(processor, prompt(400, 0), answers[0])
    with pytest.raises(ValueError, match="policy='full'"):
        Engine(model, policy="dense", record=True)


@pytest.mark.compiles
def test_compiled_it_records_the_same():
    model = random_model(tiny_config(layers=2, hidden_size=96, heads=6, kv_heads=2, head_dim=16, tie=False))
    records = []
    for compile in (False, True):
        engine = Engine(model, HybridConfig(budget=0.4), compile=compile, record=True)
        engine.generate([prompt(500, 0)], 20)
        records += engine.cache.recording.records
    slow, fast = records
    assert len(slow.retrieved) == 19
    for a, b in zip(slow.retrieved, fast.retrieved, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[head], b[head]) for head in a)


def test_the_command_writes_one_page_for_both_caches(vlm, tmp_path, capsys):
    picture, out = tmp_path / "a.png", tmp_path / "out.html"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (336, 336, 3), dtype=np.uint8)).save(picture)
    generate.main(
        ["--model", str(vlm), "--image", str(picture), "--prompt", "What?", "--compare", "--no-compile",
         "--no-calibration", "--json", "--max-new-tokens", "5", "--report", str(out)]
    )  # fmt: skip
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    html = out.read_text(encoding="utf-8")
    data = data_of(html)
    assert [run["policy"] for run in data["runs"]] == ["hybridkv", "full"]
    assert {kind for row in data["runs"][1]["kinds"] for kind in row} == {"whole"}
    for run, row in zip(data["runs"], rows, strict=True):
        assert len(run["answer"]) == len(row["token_ids"])
    assert html.count("<rect x=") == 5  # the full cache, and resident and step of each


def test_a_store_in_host_memory_is_recorded_and_shown(tiny):
    asked = prompt(400, 0)
    device, host = (recorded(tiny, asked, budget=0.4, store=store) for store in ("device", "host"))
    cache, (record,) = host.cache, host.cache.recording.records
    assert record.retrieved[-1]
    for (layer, head), chosen in record.retrieved[-1].items():
        frames = int(cache.start[layer, head]) + torch.arange(len(chosen))
        assert cache.pools[0].held[frames].sort().values.tolist() == chosen.tolist()  # what is in the lane's frames now
    html = host.report(tiny[1], asked, [1, 2, 3])
    assert "in host memory: " in html and "in host memory: " not in device.report(tiny[1], asked, [1, 2, 3])


def test_a_question_about_a_reading(tiny):
    model, processor = tiny
    picture = Image.new("RGB", (336, 336), "teal")
    asked = processor("What is it?", images=[picture])
    engine = Engine(model, HybridConfig(budget=0.5, strict=False), compile=False, record=True)
    reading = engine.read(asked)
    for prompt_, colour in ((asked, (0, 128, 128)), (processor("And?", after=reading.messages), (128, 128, 128))):
        result = engine.ask(reading, prompt_, 4)
        (input_,) = data_of(engine.report(processor, prompt_, result.token_ids))["inputs"]
        (frame,) = input_["frames"]
        with Image.open(io.BytesIO(base64.b64decode(frame.partition(",")[2]))) as shown:
            assert shown.convert("RGB").getpixel((50, 50)) == colour
