"""The page of `--report` in a real browser: it draws, the keyboard moves it, nothing is asked for, nothing runs amok.

    make test-browser     # needs Chromium: Debian's `chromium`, or playwright install chromium

With PICTURES=FOLDER in the environment the screenshots are left there, to be looked at.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from hybridkv import Engine, HybridConfig, demos
from hybridkv.html import Run, page
from hybridkv.model import Processor, from_pretrained

pytestmark = pytest.mark.browser
ATTACK = "</script><script>window.hacked = 1</script><img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with api.sync_playwright() as play:
        try:
            launched = play.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except api.Error as e:
            pytest.skip(f"no browser can be started: {str(e).splitlines()[0]}")
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """The chain demo, beside the full cache."""
    demo = demos.by_name()["chain"]
    model = from_pretrained(demos.MODEL, dtype=torch.float32, progress=False)
    processor = Processor.from_pretrained(demos.MODEL)
    asked, runs = processor(demo.prompt, images=demo.images), []
    with torch.no_grad():
        for policy in ("hybridkv", "full"):
            engine = Engine(model, HybridConfig(), policy, eos=model.cfg.eos_token_id, compile=False, record=True)
            (result,) = engine.generate([asked], 20)
            runs.append(Run.of(engine, result.token_ids))
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(processor, asked, runs), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser, file):
    """Opens the page at a width and in a colour scheme; fails on any error or request."""
    made = []

    def open_page(width: int = 1180, scheme: str = "light", path: Path = file):
        view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        view.trouble = []
        view.on("pageerror", lambda error: view.trouble.append(str(error)))
        view.on("console", lambda m: m.type == "error" and view.trouble.append(m.text))
        view.on("request", lambda r: r.url.startswith(("file:", "data:")) or view.trouble.append(r.url))
        view.goto(path.as_uri())
        view.wait_for_function("canvases.every((c) => c.canvas.width > 300)")
        made.append(view)
        return view

    yield open_page
    for view in made:
        assert not view.trouble
        view.close()


def drawn(view, nth: int) -> str:
    """What a canvas shows."""
    return view.evaluate("(n) => canvases[n].canvas.toDataURL()", nth)


def test_the_keyboard_moves_from_word_to_word(opened):
    view = opened()
    slider, said = view.locator("#token"), view.locator("#state")
    assert said.text_content().startswith("3 of 8: \u201cLk\u201d. 8 heads fetched ")
    kept, fetched = drawn(view, 0), drawn(view, 1)
    slider.focus()
    view.keyboard.press("ArrowRight")
    assert said.text_content().startswith("4 of 8: \u201cmt\u201d.")
    assert slider.get_attribute("aria-valuetext").strip() == "mt"
    assert drawn(view, 0) == kept and drawn(view, 1) != fetched
    view.keyboard.press("Home")
    assert "fetches nothing" in said.text_content()
    view.keyboard.press("End")
    assert said.text_content().startswith("8 of 8")
    view.locator("#answer button").nth(1).click()
    assert said.text_content().startswith("2 of 8: \u201cMY\u201d.") and slider.input_value() == "1"


def test_one_head_alone(opened):
    view = opened()
    kept, said = drawn(view, 0), view.locator("#state")
    view.locator(".head.dynamic").first.focus()
    view.keyboard.press("Enter")
    assert "1 head fetched" in said.text_content()
    assert view.locator('.head[aria-pressed="true"]').count() == 1
    view.locator(".head.static").first.click()
    assert "This head fetches nothing" in said.text_content() and drawn(view, 0) != kept
    view.keyboard.press("Escape")
    assert "8 heads fetched" in said.text_content() and drawn(view, 0) == kept


def test_the_other_cache(opened):
    view = opened()
    view.get_by_label("full").check()
    assert view.locator(".head.whole").count() == 32 and "No head fetches" in view.locator("#state").text_content()
    assert view.locator("figcaption.fetched").is_hidden() and view.locator("figcaption.kept").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1180, 390])
def test_it_fits_the_window_in_both_colour_schemes(opened, tmp_path, width, scheme):
    view = opened(width, scheme)
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    shown = Path(os.environ.get("PICTURES", tmp_path)) / f"report-{width}-{scheme}.png"
    view.screenshot(path=shown, full_page=True)
    with Image.open(shown) as picture:
        corner = sum(picture.convert("RGB").getpixel((2, 2))) / 3
        assert picture.width == width and (corner < 80 if scheme == "dark" else corner > 200)


def test_a_hostile_prompt_and_answer_run_nothing(opened, vlm, tmp_path):
    model, processor = from_pretrained(vlm, dtype=torch.float32, progress=False), Processor.from_pretrained(vlm)
    asked = processor(ATTACK, images=[Image.new("RGB", (840, 840), "teal")], context=ATTACK * 5)
    engine = Engine(model, HybridConfig(strict=False), compile=False, record=True)
    engine.generate([asked], 5)
    path = tmp_path / "hostile.html"
    path.write_text(engine.report(processor, asked, processor(ATTACK).input_ids.tolist()[:60]), encoding="utf-8")
    view = opened(path=path)
    assert view.evaluate("window.hacked") is None
    assert view.locator("#prompt").text_content().count("window.hacked = 1") == 6
