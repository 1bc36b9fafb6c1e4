"""The demo page in headless Chromium, on every tab, with Ray Serve behind it."""

import asyncio
import io
import json
import shutil
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import TimeoutError as PlaywrightTimeout
from playwright.sync_api import sync_playwright
from tiny import subject_image, tiny_pipeline

from demo.mask_overlay import SUBJECT_COLORS, contrast
from demo.ui import build_demo, launch_demo
from realcustom import SamplingDefaults
from serving.clients import (
    DeadlineExceeded,
    Event,
    Limits,
    ModelInfo,
    Progress,
    PromptLength,
    QueueFull,
    Request,
    Result,
    ServerError,
    Unavailable,
)
from serving.clients.local import start
from serving.settings import Settings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
TIMEOUT_S = 60  # of every wait; a busy machine takes its time

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Ray Serve with the toy model and a batch size of 2; its default of 25 steps lets the page request up to 100."""
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
    """Address of the page."""
    demo = build_demo(server, asyncio.run(server.model()))
    yield launch_demo(demo, Limits())
    demo.close()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def external_requests():
    """URLs that `page` has requested from other hosts."""
    return []


@pytest.fixture
def page(url, browser, external_requests):  # `url` first: the page must be launched before Playwright's event loop runs
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(TIMEOUT_S * 1000)
    page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else external_requests.append(r.url))
    page.goto(url)
    page.wait_for_selector("#One2One-prompt")
    yield page
    page.close()


def png(image: Image.Image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"name": "subject.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def open_tab(page, tab: str) -> None:
    page.get_by_role("tab", name=tab, exact=True).click()
    wait_for_frames(page, f"#{tab}-prompt")


def open_settings(page, tab: str) -> None:
    if not page.is_visible(f"#{tab}-seed"):
        page.click(f"#{tab}-settings button")
        wait_for_frames(page, f"#{tab}-seed")


def wait_for_frames(page, shown: str) -> None:
    """Wait for an element that has just been shown, and for two animation frames.

    Gradio sets the components of a tab or an accordion to their initial values one frame after it opens, and would
    undo what a test enters before that.
    """
    page.wait_for_selector(shown)
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def fill_in(page, tab: str, prompt: str, slots: list[tuple[Image.Image, list[str]]]) -> None:
    """Open a tab, upload the images, type the prompt, select the words, and enter a seed."""
    open_tab(page, tab)
    page.fill(f"#{tab}-prompt textarea", prompt)
    if len(slots) > 2:
        page.click(f"#{tab}-more")
    for index, (image, words) in enumerate(slots):
        page.set_input_files(f"#{tab}-image-{index} input[type=file]", png(image))
        page.wait_for_selector(f"#{tab}-image-{index} img")
        for word in words:
            page.click(f"#{tab}-words-{index} label:has-text('{word}')")
    open_settings(page, tab)
    page.fill(f"#{tab}-seed input", "11")


def generate(page, tab: str) -> tuple[np.ndarray, np.ndarray]:
    """Click Generate and wait; returns the image and the image with masks, as int arrays."""
    find = f"['live', 'masks'].map(name => document.querySelector(`#{tab}-${{name}} img`)?.src)"
    before = page.evaluate(find)
    page.click(f"#{tab}-generate")
    page.wait_for_function(
        f"""before => document.querySelector('#{tab}-status').innerText.includes('Done. Seed 11')
        && {find}.every((source, index) => source && source !== before[index])""",
        arg=before,
    )
    page.wait_for_selector(f"#{tab}-generate:enabled")
    image, with_masks = (load(page, source) for source in page.evaluate(find))
    return image, with_masks


def load(page, source: str) -> np.ndarray:
    """An image of the page as an int array."""
    return np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")).astype(int)


def colored_region(image: np.ndarray, with_masks: np.ndarray) -> np.ndarray:
    """Where the masks color the image, bool [height, width]."""
    gray = Image.fromarray(image.astype(np.uint8)).convert("L").convert("RGB")
    desaturated = np.asarray(Image.blend(Image.fromarray(image.astype(np.uint8)), gray, 0.6)).astype(int)
    return np.abs(with_masks - desaturated).max(-1) > 8


CASES = {
    "One2One": ("a dog runs", [(subject_image("red"), ["dog"])]),
    "One2Many": ("a dog and cat", [(subject_image("red"), ["dog", "cat"])]),
    "Many2Many": (
        "a dog and cat at a house",
        [(subject_image(c), [w]) for c, w in zip(("red", "blue", "green"), ("dog", "cat", "house"))],
    ),
}


@pytest.mark.parametrize("tab", CASES)
def test_reference_changes_the_image_inside_the_mask(page, external_requests, tab):
    prompt, slots = CASES[tab]
    fill_in(page, tab, prompt, slots)
    first, masks = generate(page, tab)
    page.click(f"#{tab}-image-0 button[aria-label='Clear'], #{tab}-image-0 button[aria-label='Remove Image']")
    page.set_input_files(f"#{tab}-image-0 input[type=file]", png(subject_image("lime")))
    page.wait_for_selector(f"#{tab}-image-0 img")
    second, other_masks = generate(page, tab)

    change = np.abs(first - second).mean(-1)
    inside = colored_region(first, masks) | colored_region(second, other_masks)
    assert change.max() > 2, "a different reference must give a different image"
    assert 0.02 < inside.mean() < 0.98
    assert change[inside].mean() > change[~inside].mean()
    assert not external_requests, "the page must load nothing from other hosts"


def test_empty_seed_is_random_and_can_be_reused(page):
    """Opening the settings leaves the seed empty; the button below the results copies the last seed into the field."""
    open_settings(page, "One2One")
    page.wait_for_timeout(500)
    assert page.input_value("#One2One-seed input") == ""
    page.fill("#One2One-prompt textarea", "a dog runs")
    page.set_input_files("#One2One-image-0 input[type=file]", png(subject_image("red")))
    page.click("#One2One-words-0 label:has-text('dog')")
    page.click("#One2One-generate")
    page.wait_for_function("document.querySelector('#One2One-status').innerText.includes('Done. Seed')")
    seed = page.inner_text("#One2One-status").split("Seed ")[1].split(".")[0]
    page.click("#One2One-reuse")
    page.wait_for_function(f"document.querySelector('#One2One-seed input').value === '{seed}'")
    assert int(seed) > 1000


def test_earlier_results_are_in_the_gallery(page):
    """The gallery is hidden until there is an earlier result, which stays in it."""
    fill_in(page, "One2One", *CASES["One2One"])
    first, first_masks = generate(page, "One2One")
    assert page.locator("#One2One-gallery").count() == 0 or page.is_hidden("#One2One-gallery")
    page.fill("#One2One-prompt textarea", "a dog sleeps")
    second, _ = generate(page, "One2One")
    sources = page.evaluate("[...document.querySelectorAll('#One2One-gallery img')].map(image => image.src)")
    shown = [load(page, source) for source in sources]
    assert len(shown) == 2 and (shown[0] == first).all() and (shown[1] == first_masks).all()
    assert (first != second).any()


def test_input_error_shows_a_message_and_keeps_generate_enabled(page):
    page.fill("#One2One-prompt textarea", "a dog runs")
    page.click("#One2One-generate")
    toast = page.wait_for_selector("[data-testid=toast-body], .toast-body")
    assert "Upload an image of the subject" in toast.inner_text()
    page.wait_for_selector("#One2One-status:has-text('Upload an image of the subject')")
    page.wait_for_selector("#One2One-generate:enabled")
    assert page.is_disabled("#One2One-stop")


class ScriptedClient:
    """A client without a server, whose images fail with `error` or succeed.

    Attributes:
        error: of the next image after its second step; None for a result.
        requests: all requests so far.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.requests: list[Request] = []

    async def model(self) -> ModelInfo:
        words = {"subjects": ["dog", "cat", "house"], "scenes": ["on the beach"]}
        return ModelInfo(id="toy", preset="paper", sampling=SamplingDefaults(), limits=Limits(), vocabulary=words)

    async def prompt_length(self, prompt: str) -> PromptLength:
        return PromptLength(num_tokens=80, max_tokens=77, num_chars_read=prompt.find(" beyond"))

    async def stream(
        self, request: Request, *, previews: bool | int = True, timeout_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        preview, mask = subject_image("red"), Image.new("L", subject_image().size, 128)
        for step in (1, 2):
            yield Progress(step, 4, preview, (mask,) * len(request.subjects))
            await asyncio.sleep(0.1)
        if self.error is not None:
            raise self.error
        yield Result(preview, (mask,) * len(request.subjects), request.seed)


@pytest.fixture(scope="module")
def scripted(browser):
    """A `ScriptedClient`, and the address of its page."""
    client = ScriptedClient()
    with ThreadPoolExecutor() as pool:  # Playwright's event loop runs in this thread
        info = pool.submit(lambda: asyncio.run(client.model())).result()
        demo = build_demo(client, info)
        address = pool.submit(launch_demo, demo, info.limits).result()
    yield client, address
    demo.close()


@pytest.fixture
def client(scripted) -> ScriptedClient:
    client, _ = scripted
    client.error = None
    client.requests.clear()
    return client


@pytest.fixture
def scripted_page(client, scripted, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(TIMEOUT_S * 1000)
    page.goto(scripted[1])
    page.wait_for_selector("#One2One-prompt")
    yield page
    page.close()


LATE_ERRORS = [
    (ServerError("the replica failed."), "the replica failed."),
    (Unavailable("the replica was lost."), "the replica was lost."),
    (QueueFull("the queue is full."), "the queue is full."),
    (DeadlineExceeded("the deadline has passed."), "the deadline has passed."),
    (KeyError("bug"), "Internal error"),
]


def test_late_errors_are_shown_and_generate_is_enabled_again(scripted_page, client):
    """After each error the same page can generate again, and finally succeeds."""
    page = scripted_page
    fill_in(page, "One2One", *CASES["One2One"])
    for client.error, message in LATE_ERRORS:
        page.click("#One2One-generate:enabled")
        page.wait_for_selector(f":is([data-testid=toast-body], .toast-body):has-text('{message}')")
        page.wait_for_selector("#One2One-generate:enabled")
        page.wait_for_selector("#One2One-stop:disabled")
        assert message in page.inner_text("#One2One-status")
    client.error = None
    page.click("#One2One-generate")
    page.wait_for_selector("#One2One-status:has-text('Done. Seed 11')")


def test_unreadable_upload_is_refused_next_to_the_image(scripted_page):
    """The message names the file, and disappears after an upload that can be read."""
    page = scripted_page
    page.set_input_files(
        "#One2One-image-0 input[type=file]", {"name": "cat.png", "mimeType": "image/png", "buffer": b"text"}
    )
    page.wait_for_selector("#One2One-note-0:has-text('cat.png is not an image; send PNG, JPEG')")
    page.wait_for_selector("#One2One-image-0 input[type=file]", state="attached")
    page.set_input_files("#One2One-image-0 input[type=file]", png(subject_image("red")))
    page.wait_for_selector("#One2One-image-0 img")
    page.wait_for_selector("#One2One-note-0", state="hidden")


def test_a_word_or_a_phrase_is_selected_and_a_word_can_be_deselected(scripted_page):
    page = scripted_page
    words = "#One2One-words-0"
    page.fill("#One2One-prompt textarea", "a dog and a cat")
    for word in ("dog", "cat"):
        page.click(f"{words} label:has-text('{word}')")
        page.wait_for_selector(f"{words} label.selected:has-text('{word}')")
        page.wait_for_function(f"document.querySelectorAll('{words} label.selected').length === 1")
    page.fill("#One2One-phrase-0 input, #One2One-phrase-0 textarea", "a cat")
    page.press("#One2One-phrase-0 input, #One2One-phrase-0 textarea", "Tab")
    page.wait_for_selector(f"{words} label.selected", state="detached")
    page.click(f"{words} label:has-text('dog')")
    page.wait_for_selector(f"{words} label.selected:has-text('dog')")
    assert page.input_value("#One2One-phrase-0 input, #One2One-phrase-0 textarea") == ""
    page.click(f"{words} label:has-text('dog')")
    page.wait_for_selector(f"{words} label.selected", state="detached")


def test_unknown_and_ignored_words_are_marked_in_the_prompt(scripted_page):
    """Chips of words that the model does not know, or does not read, are marked; the note says where the limit is."""
    page = scripted_page
    page.fill("#One2One-prompt textarea", "a unicorn on the beach")
    page.wait_for_selector("#One2One-words-0 label.unknown:has-text('unicorn')")
    assert page.inner_text("#One2One-prompt-note") == "Unknown to this model: unicorn."
    assert page.locator("#One2One-words-0 label:is(.unknown, .ignored)").count() == 1
    page.fill("#One2One-prompt textarea", f"a dog {15 * 'and a dog '}beyond the dog")
    page.wait_for_selector("#One2One-words-0 label.ignored:has-text('beyond')")
    note = page.inner_text("#One2One-prompt-note")
    assert "reads 77 tokens and ignores the rest: beyond the dog" in note
    chips = page.locator("#One2One-words-0 label.ignored")
    assert chips.all_inner_texts() == ["beyond", "the"], "the word dog also occurs within the limit"
    assert "beyond the token limit" in chips.nth(1).locator("input").get_attribute("title")
    page.fill("#One2One-prompt textarea", "a dog on the beach")
    page.wait_for_selector("#One2One-prompt-note mark", state="hidden")
    page.wait_for_function("!document.querySelector('#One2One-words-0 label:is(.unknown, .ignored)')")


def make_result(page, seed: int = 3) -> None:
    """Fill in the first example and wait for its result."""
    page.click("#One2One-example-0")
    page.wait_for_selector("#One2One-words-0 label.selected:has-text('dog')")
    open_settings(page, "One2One")
    page.fill("#One2One-seed input", str(seed))
    page.click("#One2One-generate")
    page.wait_for_selector(f"#One2One-status:has-text('Done. Seed {seed}')")


def test_images_have_alternative_texts(scripted_page):
    """They say what each image shows: subject, preview, result, masks, earlier results and examples."""
    page = scripted_page
    make_result(page, seed=3)
    result = "Result for 'a dog on the beach', seed 3"
    expected = {"image-0": "Reference image of dog", "live": result, "masks": f"Guidance masks of dog. {result}"}
    for name, text in expected.items():
        page.wait_for_selector(f'#One2One-{name} img[alt="{text}"]')
    make_result(page, seed=4)
    page.wait_for_selector("#One2One-gallery img >> nth=1")
    texts = page.locator("#One2One-gallery img").evaluate_all("images => images.map(image => image.alt)")
    assert texts == [result, "Guidance masks of dog, seed 3"]
    assert page.evaluate("[...document.images].filter(image => !image.alt && image.checkVisibility()).length") == 0


def test_a_result_can_be_used_as_the_subject(scripted_page, client):
    """An image is dragged onto a subject, which may have an image already; a button does the same."""
    page = scripted_page
    make_result(page)
    source = lambda name: f"document.querySelector('#One2One-{name} img')?.src"

    def assert_subject_becomes(name: str, before: str | None) -> None:
        page.wait_for_function(f"before => {source('image-0')} && {source('image-0')} !== before", arg=before)
        assert (load(page, page.evaluate(source("image-0"))) == load(page, page.evaluate(source(name)))).all()

    for name in ("masks", "live"):
        before = page.evaluate(source("image-0"))
        page.drag_and_drop(f"#One2One-{name} img", "#One2One-image-0")
        assert_subject_becomes(name, before)
    page.click("#One2One-image-0 button[aria-label='Remove Image']")
    page.wait_for_selector("#One2One-image-0 img", state="detached")
    page.click("#One2One-use")
    assert_subject_becomes("live", None)
    result = load(page, page.evaluate(source("live")))
    page.click("#One2One-generate:enabled")
    until(lambda: len(client.requests) == 2)
    assert (client.requests[1].subjects[0].image.pixels == result).all()
    page.wait_for_selector("#One2One-status:has-text('Done. Seed')")


def test_arrow_keys_move_between_word_chips(scripted_page):
    """One chip of a group is in the tab order."""
    page = scripted_page
    page.fill("#One2One-prompt textarea", "a dog runs")
    page.wait_for_selector("#One2One-words-0 label:has-text('runs')")
    page.focus("#One2One-words-0 input >> nth=0")
    focused = lambda: page.evaluate("document.activeElement.name")
    for key, word in (("ArrowRight", "dog"), ("ArrowDown", "runs"), ("ArrowRight", "a"), ("ArrowLeft", "runs")):
        page.keyboard.press(key)
        assert focused() == word
    page.keyboard.press("Space")
    page.wait_for_selector("#One2One-words-0 label.selected:has-text('runs')")
    in_tab_order = page.locator("#One2One-words-0 input[tabindex='0']")
    assert in_tab_order.evaluate_all("inputs => inputs.map(input => input.name)") == ["runs"]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#One2One-phrase-0') !== null")


def test_chips_of_one_image_have_the_colors_of_their_masks(scripted_page):
    page = scripted_page
    open_tab(page, "One2Many")
    page.click("#One2Many-example-0")
    page.wait_for_selector("#One2Many-words-0 label.selected >> nth=1")
    chips = page.locator("#One2Many-words-0 label.selected")
    shown = chips.evaluate_all("labels => labels.map(label => getComputedStyle(label).backgroundColor)")
    assert [to_hex(color) for color in shown] == list(SUBJECT_COLORS[:2])


def test_size_is_selected_on_the_page(scripted_page, client):
    page = scripted_page
    page.click("#One2One-size input")
    page.click("[role=option]:has-text('(3:2)') >> nth=0")
    make_result(page)
    assert (client.requests[0].width, client.requests[0].height) == (1280, 832)


VISIBLE_TEXTS = """() => {
  const parse = color => color.match(/[\\d.]+/g).map(Number);
  const texts = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join("") ||
      (element.matches("textarea, input:not([type=checkbox], [type=radio], [type=range], [type=file])") &&
        (element.value || element.placeholder));
    if (!text || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    if (element.closest("button:disabled, script, style")) continue;
    let color = parse(getComputedStyle(element).color), background = [0, 0, 0, 0];
    if (element.placeholder && !element.value) color = parse(getComputedStyle(element, "::placeholder").color);
    for (let parent = element; parent && background[3] < 1; parent = parent.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(parent).backgroundColor);
      const under = (1 - background[3]) * a;
      background = [r, g, b].map((c, i) => background[i] + under * c).concat(background[3] + under);
    }
    texts.push([text.slice(0, 40), color.slice(0, 3), background.slice(0, 3)]);
  }
  return texts;
}"""


def to_hex(color: str | list[float]) -> str:
    channels = color[4:-1].split(",") if isinstance(color, str) else color
    return "#" + "".join(f"{round(float(channel)):02x}" for channel in channels)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_has_sufficient_contrast(scripted, client, browser, theme):
    """At least 4.5:1 for every visible text, as in WCAG 2.1 AA, before and after images and errors are shown."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.goto(f"{scripted[1]}/?__theme={theme}")
    page.wait_for_selector("#One2One-prompt")
    low = lambda: [
        (text, to_hex(color), to_hex(background))
        for text, color, background in page.evaluate(VISIBLE_TEXTS)
        if contrast(to_hex(color), to_hex(background)) < 4.5
    ]
    assert len(page.evaluate(VISIBLE_TEXTS)) > 20 and not low()
    make_result(page)
    make_result(page)
    page.fill("#One2One-prompt textarea", "a unicorn")
    page.wait_for_selector("#One2One-words-0 label.unknown")
    page.click("#One2One-generate")
    page.wait_for_selector("#One2One-status .status-error")
    page.wait_for_timeout(300)  # transitions of colors
    assert not low()
    page.close()


def test_number_of_mask_steps_follows_the_number_of_steps(scripted_page):
    page = scripted_page
    open_settings(page, "One2One")
    page.fill("#One2One-steps input[type=number]", "5")
    page.press("#One2One-steps input[type=number]", "Tab")
    page.wait_for_function("document.querySelector('#One2One-stop-step input[type=range]').max === '5'")
    assert page.input_value("#One2One-stop-step input[type=number]") == "5"


def test_example_selects_its_word_and_image_labels_are_above_the_images(scripted_page):
    page = scripted_page
    page.click("#One2One-example-0")
    image = page.wait_for_selector("#One2One-image-0 img").bounding_box()
    page.wait_for_timeout(500)  # later events must not clear the word
    assert page.inner_text("#One2One-words-0 label.selected") == "dog"
    label = page.locator("#One2One-image-0 [data-testid=block-label]").bounding_box()
    assert label["y"] + label["height"] <= image["y"]


@pytest.mark.parametrize(
    "tab,subjects,prompt",
    [("One2One", ["owl"], "an owl in the snow"), ("Many2Many", ["dog", "owl"], "a dog and an owl in the snow")],
)
def test_composer_writes_the_prompt(page, tab, subjects, prompt):
    """Chips of subjects and scenes write the prompt, whose words can then be selected."""
    open_tab(page, tab)
    page.click(f"#{tab}-compose button")
    for word in subjects:
        page.click(f"#{tab}-known-subjects label:has-text('{word}')")
    page.click(f"#{tab}-known-scenes label:has-text('in the snow')")
    page.wait_for_function(f"() => document.querySelector('#{tab}-prompt textarea').value === '{prompt}'")
    page.wait_for_selector(f"#{tab}-words-0 label:has-text('{subjects[0]}')")


class FullServer:
    """Context manager: two images of 1000 steps fill the batch of the server."""

    def __init__(self, server) -> None:
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
    """Statistics of the replica. In a separate thread, because Playwright's event loop runs in this one."""
    with ThreadPoolExecutor() as pool:
        return pool.submit(lambda: asyncio.run(server.stats())).result()


def until(condition, timeout_s=TIMEOUT_S) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"the condition did not become true within {timeout_s} s"
        time.sleep(0.05)


def start_long_image(page) -> None:
    fill_in(page, "One2One", "a dog runs", [(subject_image("red"), ["dog"])])
    page.fill("#One2One-steps input[type=number]", "100")
    page.click("#One2One-generate")


@pytest.mark.parametrize("action", ["stop", "close tab"])
def test_stop_and_closed_tab_cancel_the_image(server, page, action):
    """The replica ends the image before its 100 steps are done."""
    for attempt in range(5):  # the image may be done before the browser has clicked
        before = stats(server)["steps"]
        if attempt == 0:
            start_long_image(page)
        else:
            page.click("#One2One-generate:enabled")
        until(lambda: stats(server)["steps"] > before + 5)  # noqa: B023
        if action == "stop":
            with suppress(PlaywrightTimeout):  # the button is disabled once the image is done
                page.click("#One2One-stop", timeout=2000)
        else:
            page.close()
        until(lambda: stats(server)["active"] == 0)
        if action == "close tab" or stats(server)["steps"] < before + 100:
            break
    assert stats(server)["steps"] < before + 100
    if action == "stop":
        page.wait_for_selector("#One2One-status:has-text('Stopped')")
        page.wait_for_timeout(500)  # late progress events must not overwrite the status
        assert "Stopped" in page.inner_text("#One2One-status")
        assert page.is_enabled("#One2One-generate") and page.is_disabled("#One2One-stop")


def test_queue_position_is_shown_and_closed_tab_leaves_the_queue(server, page, browser):
    with FullServer(server):
        first = browser.new_page()
        first.goto(page.url)
        first.wait_for_selector("#One2One-prompt")
        start_long_image(first)
        until(lambda: stats(server)["waiting"] == 1)
        start_long_image(page)
        page.wait_for_function(
            "() => document.querySelector('#One2One-status').innerText.includes('1 image ahead of yours')"
        )
        first.close()
        page.wait_for_function("() => document.querySelector('#One2One-status').innerText.includes('yours is next')")
        page.close()
        until(lambda: stats(server)["waiting"] == 0)


def test_page_fits_a_phone_screen(scripted, client, browser):
    """Before and after results are shown; captions and labels do not cover images."""
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(scripted[1])
    page.wait_for_selector("#One2One-prompt")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    make_result(page)
    make_result(page)
    page.wait_for_selector("#One2One-gallery img >> nth=1")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = lambda selector: [item.bounding_box() for item in page.locator(selector).all()]
    images = boxes("#One2One-gallery img, #One2One-live img, #One2One-masks img")
    labels = boxes(
        ":is(#One2One-gallery, #One2One-live, #One2One-masks) :is([data-testid=block-label], .caption-label)"
    )
    assert len(images) == 4 and len(labels) == 5
    assert not [(image, label) for image in images for label in labels if overlap(image, label)]
    page.close()


def overlap(box: dict, other: dict) -> bool:
    """Whether two boxes share more than a pixel in both directions."""
    return all(
        min(box[start] + box[size], other[start] + other[size]) - max(box[start], other[start]) > 1
        for start, size in (("x", "width"), ("y", "height"))
    )
