"""From the browser through Ray Serve and back, in headless Chromium, on every tab."""

import asyncio
import io
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from tiny import subject_image, tiny_pipeline

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Ray Serve with the toy model and two places; its default of 25 steps lets the page ask for up to 100."""
    from serving.clients.local import start
    from serving.settings import Settings

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    words = {"subjects": ["dog", "cat", "owl"], "scenes": ["on the beach", "in the snow"]}
    (folder / "vocabulary.json").write_text(json.dumps(words))
    index = json.loads((folder / "model_index.json").read_text())
    index["realcustom_config"]["sampling"]["num_inference_steps"] = 25
    (folder / "model_index.json").write_text(json.dumps(index))
    server = start(Settings(model=str(folder), cpu_threads=1, max_batch_size=2, max_steps=1000))
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def url(server):
    """The page over the server."""
    from demo.theme import CSS, THEME
    from demo.ui import build_demo

    demo = build_demo(server, asyncio.run(server.model()))
    _, address, _ = demo.launch(
        server_name="127.0.0.1", theme=THEME, css=CSS, prevent_thread_lock=True, quiet=True, ssr_mode=False
    )
    yield address
    demo.close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(url, browser):  # the server first: Playwright's own event loop must not be running yet
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(20_000)
    page.foreign = []
    page.on("request", lambda r: page.foreign.append(r.url) if not r.url.startswith((url, "data:", "blob:")) else None)
    page.goto(url)
    page.wait_for_selector("#One2One-prompt")
    yield page
    page.close()


def png(image: Image.Image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"name": "subject.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def choose(page, tab: str, prompt: str, slots: list[tuple[Image.Image, list[str]]]) -> None:
    """Fill in a tab as a person does: open it, drop images, type the prompt, click the words; a seed in settings."""
    page.get_by_role("tab", name=tab, exact=True).click()
    page.fill(f"#{tab}-prompt textarea", prompt)
    if len(slots) > 2:
        page.click(f"#{tab}-more")
    for index, (image, words) in enumerate(slots):
        page.set_input_files(f"#{tab}-image-{index} input[type=file]", png(image))
        page.wait_for_selector(f"#{tab}-image-{index} img")
        for word in words:
            page.click(f"#{tab}-words-{index} label:has-text('{word}')")
    page.click(f"#{tab}-settings button")
    page.fill(f"#{tab}-seed input", "11")


def generate(page, tab: str) -> tuple[np.ndarray, np.ndarray]:
    """Press the button and wait; the image and the image with masks, as int arrays."""
    find = f"[...document.querySelectorAll('#{tab}-gallery img')].map(image => image.src)"
    before = page.evaluate(find)
    page.click(f"#{tab}-generate")
    page.wait_for_function(
        f"before => {{ const now = {find}; return now.length >= 2 && now[0] !== before[0]; }}", arg=before
    )
    assert "Done. Seed 11" in page.inner_text(f"#{tab}-status")
    sources = page.evaluate(find)[:2]
    made = [Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB") for source in sources]
    return tuple(np.asarray(image).astype(int) for image in made)


def marked(image: np.ndarray, with_masks: np.ndarray) -> np.ndarray:
    """Where the masks color the image, bool [height, width]."""
    gray = Image.fromarray(image.astype(np.uint8)).convert("L").convert("RGB")
    ground = np.asarray(Image.blend(Image.fromarray(image.astype(np.uint8)), gray, 0.6)).astype(int)
    return np.abs(with_masks - ground).max(-1) > 8


CASES = {
    "One2One": ("a dog runs", [(subject_image("red"), ["dog"])]),
    "One2Many": ("a dog and cat", [(subject_image("red"), ["dog", "cat"])]),
    "Many2Many": (
        "a dog and cat at a house",
        [(subject_image(c), [w]) for c, w in zip(("red", "blue", "green"), ("dog", "cat", "house"))],
    ),
}


@pytest.mark.parametrize("tab", CASES)
def test_a_tab_makes_a_image_that_depends_on_its_reference_inside_the_mask(page, tab):
    prompt, slots = CASES[tab]
    choose(page, tab, prompt, slots)
    first, masks = generate(page, tab)
    page.click(f"#{tab}-image-0 button[aria-label='Clear'], #{tab}-image-0 button[aria-label='Remove Image']")
    page.set_input_files(f"#{tab}-image-0 input[type=file]", png(subject_image("lime")))
    page.wait_for_selector(f"#{tab}-image-0 img")
    second, other_masks = generate(page, tab)

    change = np.abs(first - second).mean(-1)
    inside = marked(first, masks) | marked(second, other_masks)
    assert change.max() > 2, "another reference must give another image"
    assert 0.02 < inside.mean() < 0.98
    assert change[inside].mean() > change[~inside].mean()
    assert not page.foreign, "the page must load nothing from elsewhere"


def test_a_seed_that_nobody_gave_is_drawn(page):
    """Looking at the settings gives none; the button under the results brings the last one into the field."""
    page.click("#One2One-settings button")
    page.wait_for_selector("#One2One-seed input")
    page.wait_for_timeout(500)
    assert page.input_value("#One2One-seed input") == ""
    page.fill("#One2One-prompt textarea", "a dog runs")
    page.set_input_files("#One2One-image-0 input[type=file]", png(subject_image("red")))
    page.click("#One2One-words-0 label:has-text('dog')")
    page.click("#One2One-generate")
    page.wait_for_function("document.querySelector('#One2One-status').innerText.includes('Done. Seed')")
    drawn = page.inner_text("#One2One-status").split("Seed ")[1].split(".")[0]
    page.click("text=Use the seed of the first image again")
    page.wait_for_function(f"document.querySelector('#One2One-seed input').value === '{drawn}'")
    assert int(drawn) > 1000


def test_earlier_results_stay_in_the_gallery(page):
    """A second press of the button puts its image in front; the first one is still there."""
    choose(page, "One2One", *CASES["One2One"])
    first, _ = generate(page, "One2One")
    page.fill("#One2One-prompt textarea", "a dog sleeps")
    second, _ = generate(page, "One2One")
    page.wait_for_function("document.querySelectorAll('#One2One-gallery img').length >= 4")
    sources = page.evaluate("[...document.querySelectorAll('#One2One-gallery img')].map(image => image.src)")
    shown = [Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB") for source in sources]
    assert (np.asarray(shown[0]) == second).all() and (np.asarray(shown[2]) == first).all()
    assert (first != second).any()


def test_a_mistake_is_answered_with_a_sentence(page):
    page.fill("#One2One-prompt textarea", "a dog runs")
    page.click("#One2One-generate")
    toast = page.wait_for_selector("[data-testid=toast-body], .toast-body", timeout=10_000)
    assert "Add an image of the subject" in toast.inner_text()


@pytest.mark.parametrize(
    "tab,subjects,prompt",
    [("One2One", ["owl"], "an owl in the snow"), ("Many2Many", ["dog", "owl"], "a dog and an owl in the snow")],
)
def test_known_words_make_a_prompt_by_clicking(page, tab, subjects, prompt):
    """Chips of subjects and scenes write the prompt, whose words can then be clicked."""
    page.get_by_role("tab", name=tab, exact=True).click()
    page.click(f"#{tab}-compose button")
    for word in subjects:
        page.click(f"#{tab}-known-subjects label:has-text('{word}')")
    page.click(f"#{tab}-known-scenes label:has-text('in the snow')")
    page.wait_for_function(f"() => document.querySelector('#{tab}-prompt textarea').value === '{prompt}'")
    page.wait_for_selector(f"#{tab}-words-0 label:has-text('{subjects[0]}')")


class Occupied:
    """Both places of the server taken by images of 1000 steps, until the block ends."""

    def __init__(self, server) -> None:
        from serving.clients import Request

        self._server, self._loop = server, asyncio.new_event_loop()
        self._requests = [Request(prompt="a dog", num_inference_steps=1000, seed=i) for i in range(2)]
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self):
        self._thread.start()
        self._running = [asyncio.run_coroutine_threadsafe(self._server.generate(r), self._loop) for r in self._requests]
        until(lambda: stats(self._server)["active"] == 2)

    def __exit__(self, *_) -> None:
        for running in self._running:
            running.cancel()
        until(lambda: stats(self._server)["active"] == 0)
        self._loop.call_soon_threadsafe(self._loop.stop)


def stats(server) -> dict:
    """In another thread: Playwright's event loop runs in this one."""
    with ThreadPoolExecutor() as pool:
        return pool.submit(lambda: server._handle.stats.remote().result()).result()


def until(condition, timeout_s=20) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def ask_for_long_images(page) -> None:
    choose(page, "One2One", "a dog runs", [(subject_image("red"), ["dog"])])
    page.fill("#One2One-steps input[type=number]", "100")
    page.click("#One2One-generate")


@pytest.mark.parametrize("way", ["stop", "closed tab"])
def test_leaving_in_mid_image_frees_the_place(server, page, way):
    """The stop button, and closing the tab, end the image in the replica before its 100 steps are done."""
    before = stats(server)["steps"]
    ask_for_long_images(page)
    until(lambda: stats(server)["steps"] > before + 5)
    if way == "stop":
        page.click("#One2One-stop")
    else:
        page.close()
    until(lambda: stats(server)["active"] == 0)
    assert stats(server)["steps"] < before + 100
    if way == "stop":
        page.wait_for_selector("#One2One-status:has-text('Stopped')")
        page.wait_for_timeout(500)  # progress that was under way does not come back
        assert "Stopped" in page.inner_text("#One2One-status")


def test_a_visitor_in_line_hears_the_place_and_gives_it_up_by_closing_the_tab(server, page, browser):
    with Occupied(server):
        first = browser.new_page()
        first.goto(page.url)
        first.wait_for_selector("#One2One-prompt")
        ask_for_long_images(first)
        until(lambda: stats(server)["waiting"] == 1)
        ask_for_long_images(page)
        page.wait_for_function(
            "() => document.querySelector('#One2One-status').innerText.includes('1 image before yours')"
        )
        first.close()
        page.wait_for_function("() => document.querySelector('#One2One-status').innerText.includes('Next in line')")
        page.close()
        until(lambda: stats(server)["waiting"] == 0)


def test_the_page_fits_a_phone(url, browser):
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(url)
    page.wait_for_selector("#One2One-prompt")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()
