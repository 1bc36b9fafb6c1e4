"""Logic of the demo page, on a real engine with the toy pipeline."""

import asyncio
import base64
import io
import tempfile
import threading
from contextlib import aclosing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import subject_image, tiny_pipeline

from demo import tabs
from demo.components import failure, progress, side_by_side, tiled
from demo.form import read_form
from demo.generation_state import GenerationState, ImageState, generate_images
from demo.mask_overlay import SUBJECT_COLORS, contrast, overlay_masks, text_color
from demo.prompt_words import PromptWords, classify_words, prompt_note
from demo.sizes import default_size, parse_size, size_choices
from demo.task import TASKS, Task
from demo.theme import CSS
from demo.ui import build_demo, launch_demo
from demo.upload import read_upload
from realcustom import SamplingDefaults
from serving.clients import (
    INPUT_FORMATS,
    DeadlineExceeded,
    InvalidRequest,
    Limits,
    ModelInfo,
    Progress,
    PromptLength,
    Queued,
    QueueFull,
    Request,
    ServerError,
    Subject,
    Unavailable,
    words_of,
)
from serving.engine.engine import Engine

# scope, T_stop, CFG, steps, fast masks, seed, negative prompt, images, size
SETTINGS = (0.5, 2, 3.0, 4, True, "7", "", 2, "64x64")
ONE = Task(name="One", text="", num_slots=1, multiple_words=False)
MANY = Task(name="Many", text="", num_slots=1, multiple_words=True)
SLOTS = Task(name="Slots", text="", num_slots=2, multiple_words=False)
LIMITS = Limits()
FOLDER = tempfile.TemporaryDirectory()  # of uploads; deleted at exit
VOCABULARY = {"subjects": ["dog", "cat"], "scenes": ["on the beach", "at night under stars"]}


@pytest.fixture(autouse=True)
def uploads(monkeypatch):
    """Gradio's folder for uploads is `FOLDER`."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", FOLDER.name)


def info(**options) -> ModelInfo:
    return ModelInfo(id="toy", preset="paper", sampling=SamplingDefaults(), limits=Limits(), **options)


def upload(data: bytes, name: str = "subject.png") -> dict:
    """An uploaded file, as Gradio passes it without preprocessing."""
    path = Path(tempfile.mkdtemp(dir=FOLDER.name)) / name
    path.write_bytes(data)
    return {"path": str(path), "orig_name": name}


def image_file(image: Image.Image, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


def subject() -> dict:
    return upload(image_file(subject_image()))


class EngineClient:
    """An engine behind the interface of `serving.clients.Client`, without Ray."""

    def __init__(self) -> None:
        self._pipeline = tiny_pipeline()
        self.engine = Engine(self._pipeline)

    def stream(self, request, *, previews=True, timeout_s=None):
        return self.engine.stream(request.resolve(self._pipeline.sampling), previews, timeout_s)


@pytest.fixture(scope="module")
def client():
    client = EngineClient()
    yield client
    client.engine.close()


def test_selected_word_becomes_a_subject_with_the_settings_of_the_page():
    request, number = read_form(ONE, ("a dog runs", subject(), "dog", "", *SETTINGS), LIMITS)
    assert [s.target_phrase for s in request.subjects] == ["dog"]
    assert (request.subjects[0].scope_ratio, request.early_stop_step, request.guidance_scale) == (0.5, 2, 3.0)
    assert (request.num_inference_steps, request.seed, number) == (4, 7, 2)
    assert request.mask_source == "generation_branch"


def test_several_words_share_one_image_and_typed_phrases_replace_selected_words():
    selected, _ = read_form(MANY, ("a red dog and a cat", subject(), ["dog", "cat"], "", *SETTINGS), LIMITS)
    typed, _ = read_form(MANY, ("a red dog and a cat", subject(), ["dog"], "red dog, cat", *SETTINGS), LIMITS)
    assert [s.target_phrase for s in selected.subjects] == ["dog", "cat"]
    assert [s.target_phrase for s in typed.subjects] == ["red dog", "cat"]


def test_empty_slots_are_ignored():
    request, _ = read_form(SLOTS, ("a dog and a cat", subject(), "dog", "", None, None, "", *SETTINGS), LIMITS)
    assert len(request.subjects) == 1


@pytest.mark.parametrize(
    "values,message",
    [
        (("a dog", None, "dog", ""), "Upload an image for 'dog'"),
        (("a dog", subject(), None, ""), "Select the word .*: a, dog"),
        (("", None, None, ""), "Enter a prompt"),
        ((" ", subject(), [], ""), "Enter a prompt"),
        (("a dog and a cat", subject(), ["dog", "cat"], ""), "Select one word for each image, not 2: dog, cat"),
        (("a dog", None, None, ""), "Upload an image of the subject"),
    ],
)
def test_missing_input_raises_a_message_that_names_it(values, message):
    with pytest.raises(InvalidRequest, match=message):
        read_form(ONE, (*values, *SETTINGS), LIMITS)


API_VALUES = {
    "prompt": ((0, 5), "prompt is not a text"),
    "long prompt": ((0, "a" + "\u0301\u0323" * 50_000), "prompt has 100001 characters"),
    "image": ((1, "dog.png"), "no file"),
    "image without path": ((1, {"path": 5}), "no file"),
    "lost image": ((1, {"path": f"{FOLDER.name}/lost.png", "orig_name": "lost.png"}), "lost.png is not on the server"),
    "folder": ((1, {"path": FOLDER.name}), "not on the server"),
    "zero byte": ((1, {"path": f"{FOLDER.name}/\0"}), "not on the server"),
    "words": ((2, [5]), "selected words are not texts"),
    "typed phrase": ((3, 5), "typed phrase is not a text"),
    "guidance": ((6, 10**400), "too large"),
    "steps": ((7, float("inf")), "infinity"),
    "seed": ((9, "1" * 5000), "at most 19 digits"),
    "negative prompt": ((10, ["blurry"]), "negative prompt is not a text"),
    "number": ((11, float("inf")), "infinity"),
    "size": ((12, 5), "size is '5'"),
}


@pytest.mark.parametrize("name", API_VALUES)
def test_values_that_only_api_users_can_send_raise_a_sentence(name):
    (index, value), message = API_VALUES[name]
    values = ["a dog", subject(), ["dog"], "", *SETTINGS]
    values[index] = value
    with pytest.raises(InvalidRequest, match=message) as error:
        read_form(ONE, values, LIMITS)
    assert len(str(error.value)) < 200


def test_empty_seed_is_unset_and_invalid_seed_raises():
    values = ["a dog runs", subject(), "dog", "", *SETTINGS]
    read = lambda seed: read_form(ONE, (*values[:9], seed, *values[10:]), LIMITS)[0]
    assert read("").seed is None and read(None).seed is None and read(" 12 ").seed == 12
    for invalid in ("-1", "1.5", "lucky"):
        with pytest.raises(InvalidRequest, match=f"seed is '{invalid}'.*whole number"):
            read(invalid)


def dog(seed=1) -> Request:
    return Request(prompt="a dog", subjects=(Subject(image=subject_image(), target_phrase="dog"),), seed=seed)


def test_several_images_use_consecutive_seeds_and_report_joint_progress(client):
    async def run():
        async with aclosing(generate_images(client, dog(seed=5), 3)) as states:
            return [(s.status(), [image.seed for image in s.images], s.fraction) async for s in states]

    seen = asyncio.run(run())
    assert seen[-1] == ("Done. Seeds 5, 6, 7.", [5, 6, 7], 1)
    assert any(status.startswith("Step") for status, *_ in seen)
    fractions = [fraction for *_, fraction in seen]
    assert fractions == sorted(fractions) and fractions[0] < 1


def test_closing_the_generator_frees_the_engine(client):
    """Closing the generator after the first step, as the Stop button does, leaves no waiting or active image."""

    async def run():
        request = Request(prompt="a dog", num_inference_steps=100, seed=1)
        async with aclosing(generate_images(client, request, 2)) as states:
            async for state in states:
                if any(image.step for image in state.images):
                    break
        for _ in range(100):
            stats = client.engine.stats()
            if not (stats["waiting"] or stats["preparing"] or stats["active"]):
                return True
            await asyncio.sleep(0.02)
        return False

    assert asyncio.run(run())


@pytest.mark.parametrize("ticks", range(8))
def test_cancellation_is_not_lost_when_it_coincides_with_an_event(ticks):
    """Cancel the consumer a few event loop iterations after the client sends an event."""

    class OneEventClient:
        def __init__(self):
            self.sent = asyncio.Event()

        async def stream(self, request, previews):
            await self.sent.wait()
            yield Queued(0)
            await asyncio.sleep(60)

    async def run():
        client = OneEventClient()

        async def consume():
            async with aclosing(generate_images(client, dog(), 1)) as states:
                async for _ in states:
                    pass

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.05)
        client.sent.set()
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=5)
        assert done and task.cancelled()

    asyncio.run(run())


@pytest.mark.parametrize(
    "positions,status",
    [
        ((None, None), "Starting…"),
        ((0, 1), "Queued: yours is next."),
        ((1, 2), "Queued: 1 image ahead of yours."),
        ((3, 4), "Queued: 3 images ahead of yours."),
    ],
)
def test_status_reports_the_first_position_in_the_queue(positions, status):
    assert GenerationState([ImageState(position=position) for position in positions]).status() == status


def test_example_words_occur_in_their_prompt_and_example_images_exist():
    for example in (example for task in TASKS for example in task.examples):
        assert all(path.is_file() for path in example.paths)
        assert {word for words in example.words for word in words} <= set(words_of(example.prompt))


def test_error_of_one_image_is_raised(client):
    async def run():
        async with aclosing(generate_images(client, Request(prompt="a dog", height=65, seed=1), 2)) as states:
            async for _ in states:
                pass

    with pytest.raises(InvalidRequest, match="height is 65 px"):
        asyncio.run(run())


def test_image_work_runs_outside_the_event_loop(client, monkeypatch):
    """Building the request, which normalizes references, and drawing overlays run in worker threads."""
    threads: dict[str, set] = {"read_form": set(), "overlay_masks": set()}
    for name in threads:
        function = getattr(tabs, name)

        def recorded(*args, name=name, function=function):
            threads[name].add(threading.current_thread())
            return function(*args)

        monkeypatch.setattr(tabs, name, recorded)

    async def run():
        values = ("a dog runs", subject(), ["dog"], "", *SETTINGS)
        async with aclosing(tabs.generate_updates(ONE, client, LIMITS, values)) as updates:
            return [update async for update in updates]

    updates = asyncio.run(run())
    assert "Starting" in updates[0][0] and "Done. Seeds 7, 8." in updates[-1][0]
    assert all(found and threading.main_thread() not in found for found in threads.values())


def test_overlay_has_the_color_of_the_subject_inside_its_mask_only():
    image = Image.new("RGB", (20, 10), "white")
    left = Image.new("L", (20, 10))
    left.paste(255, (0, 0, 10, 10))
    shown = np.asarray(overlay_masks(image, [left])).astype(int)
    color = np.array([int(SUBJECT_COLORS[0][i : i + 2], 16) for i in (1, 3, 5)])
    assert np.abs(shown[5, 15] - 255).max() <= 1
    assert np.abs(shown[5, 5] - color).sum() < np.abs(shown[5, 5] - 255).sum()


def test_progress_names_the_target_words_in_the_colors_of_their_masks():
    html = progress("Done", 1, ["cat", "car"])
    for word, color in zip(("cat", "car"), SUBJECT_COLORS):
        assert f'<span style="color: {color}">●</span> {word}' in html


def test_progress_sets_the_width_of_the_bar_and_escapes_text():
    assert "width: 25.0%" in progress("Step 1 of 4", 0.25)
    assert "<b>" not in progress("<b>", 0) and "<b>" not in failure("<b>")


def test_thumbnails_are_in_one_row_in_order():
    row = side_by_side([subject_image("red"), subject_image("blue")], side_px=32)
    red, blue = subject_image("red").resize((32, 32)), subject_image("blue").resize((32, 32))
    assert row.size == (64, 32)
    for left, expected in ((0, red), (32, blue)):
        shown = np.asarray(row.crop((left, 0, left + 32, 32))).astype(int)
        assert np.abs(shown - np.asarray(expected.convert("RGB"))).mean() < 8


def test_each_image_keeps_its_grid_cell():
    """The cell of a missing image is white; a single image is returned unchanged."""
    red, blue = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")
    grid = tiled([red, None, blue])
    assert grid.size == (16, 12)
    colors = [grid.getpixel(position) for position in ((1, 1), (9, 1), (1, 7), (9, 7))]
    assert colors == [(255, 0, 0), (255, 255, 255), (0, 0, 255), (255, 255, 255)]
    assert tiled([red]) is red


def test_selected_words_are_in_the_order_of_the_prompt():
    """So that the colors of chips, which depend on their order, are those of the masks."""
    request, _ = read_form(MANY, ("a dog and a cat", subject(), ["cat", "dog"], "", *SETTINGS), LIMITS)
    assert [subject.target_phrase for subject in request.subjects] == ["dog", "cat"]


@pytest.mark.parametrize("index,value", [(3, None), (3, "many"), (0, "wide"), (7, 0), (7, 10**6), (8, "wide"), (8, 64)])
def test_invalid_settings_of_api_users_are_refused(index, value):
    settings = [*SETTINGS]
    settings[index] = value
    with pytest.raises(InvalidRequest):
        read_form(ONE, ("a dog runs", subject(), ["dog"], "", *settings), LIMITS)


UNREADABLE = {
    "text.png": b"not an image",
    "empty.png": b"",
    "truncated.jpg": image_file(Image.effect_noise((64, 64), 50), "JPEG")[:900],
    "photo.heic": b"\0\0\0\x18ftypheic" + bytes(100),
    "photo.avif": b"\0\0\0\x18ftypavif" + bytes(100),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_uploads_raise_a_sentence_that_names_the_file(name):
    with pytest.raises(InvalidRequest, match=f"^{name} .*[.]$"):
        read_upload(upload(UNREADABLE[name], name), LIMITS)


def test_formats_are_named_for_files_in_other_formats():
    for name in ("text.png", "photo.heic", "photo.avif"):
        with pytest.raises(InvalidRequest, match="PNG, JPEG, WEBP"):
            read_upload(upload(UNREADABLE[name], name), LIMITS)


def test_uploads_of_all_common_formats_are_read():
    for image_format in INPUT_FORMATS:
        assert read_upload(upload(image_file(subject_image(), image_format)), LIMITS).size == subject_image().size


def test_addresses_of_uploaded_files_are_read():
    """Clients of the Model Context Protocol send the address of an upload instead of its path."""
    address = f"http://127.0.0.1:7860/gradio_api/file={subject()['path']}"
    assert read_upload({"path": address}, LIMITS).size == subject_image().size


def test_paths_that_were_not_uploaded_are_refused(tmp_path):
    """An API user cannot make the server read its own files, neither directly nor through `..` or a symbolic link."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(image_file(subject_image()))
    link = Path(tempfile.mkdtemp(dir=FOLDER.name)) / "link.png"
    link.symlink_to(secret)
    address = f"http://127.0.0.1:7860/gradio_api/file={secret}"
    for path in (secret, Path(FOLDER.name) / ".." / secret.relative_to(secret.anchor), link, address):
        with pytest.raises(InvalidRequest, match="not uploaded"):
            read_upload({"path": str(path)}, LIMITS)


def test_unknown_words_are_listed_below_the_prompt():
    toy = info(vocabulary=VOCABULARY)
    assert PromptWords.of("a Dog and a <b>unicorn on the red beach", toy).unknown == ["b", "unicorn", "red"]
    note = prompt_note(PromptWords.of("a dog and a unicorn", toy), toy)
    assert note.count("<mark") == 1 and ">unicorn</mark>" in note
    assert prompt_note(PromptWords.of("a dog on the beach at night", toy), toy) == ""
    assert PromptWords.of("a unicorn", info()).unknown == [], "a model without a vocabulary knows all words"


def test_words_beyond_the_token_limit_are_listed_below_the_prompt():
    """A word that also occurs within the limit is not ignored; the note shows where the limit falls."""
    prompt = "a dog and a catfish on a <b> dog"
    words = PromptWords.of(prompt, info(), num_chars_read=prompt.index("fish"))
    assert words.ignored == ["catfish", "on", "b"]
    note = prompt_note(words, info())
    assert "reads 77 tokens" in note and ">fish on a &lt;b&gt; dog</mark>" in note
    assert PromptWords.of(prompt, info()).ignored == []


def test_the_server_is_asked_only_if_a_prompt_can_reach_the_limit():
    """If it does not answer, no words are marked."""

    class Server:
        calls = 0

        async def prompt_length(self, prompt):
            self.calls += 1
            if "cat" in prompt:
                raise QueueFull("the queue is full.")
            return PromptLength(num_tokens=80, max_tokens=77, num_chars_read=5)

    async def run(prompt):
        return await classify_words(prompt, server, info())

    server = Server()
    assert asyncio.run(run("a dog" + 70 * " ")).ignored == [] and server.calls == 0
    assert asyncio.run(run("a dog and an owl" + 70 * " ")).ignored == ["and", "an", "owl"] and server.calls == 1
    assert asyncio.run(run("a dog and a cat" + 70 * " ")).ignored == [] and server.calls == 2


@pytest.mark.parametrize("side,max_pixels", [(1024, 2048**2), (512, 512**2), (128, 2048**2), (64, 64**2)])
def test_sizes_are_within_the_limits_and_have_the_area_of_the_default(side, max_pixels):
    sampling = SamplingDefaults(height=side, width=side)
    model = ModelInfo(id="toy", preset="paper", sampling=sampling, limits=Limits(max_pixels=max_pixels))
    sizes = [parse_size(size) for _, size in size_choices(model)]
    assert sizes[0] == (side, side) == parse_size(default_size(model))
    for width, height in sizes:
        assert width * height <= max_pixels and min(width, height) >= 64 and width % 8 == height % 8 == 0
        assert min(abs(width * height / (scale * side) ** 2 - 1) for scale in (1, 0.75)) < 0.15, (width, height)
    if side == 1024:
        assert {(1152, 896), (896, 1152)} & set(sizes) and any(w / h > 1.7 for w, h in sizes)


def test_size_of_the_page_is_the_size_of_the_request():
    values = ("a dog runs", subject(), ["dog"], "", *SETTINGS[:-1])
    request, _ = read_form(ONE, (*values, "96x64"), LIMITS)
    assert (request.width, request.height) == (96, 64)
    request, _ = read_form(ONE, (*values, None), LIMITS)
    assert (request.width, request.height) == (None, None), "the default of the model"


def test_text_on_the_colors_of_subjects_can_be_read():
    for color in SUBJECT_COLORS:
        assert contrast(color, text_color(color)) >= 4.5
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_descriptions_of_images_name_prompt_seed_and_words():
    """The alternative texts of the result and its masks; before that, of the preview."""
    state = GenerationState([ImageState(image=subject_image(), seed=3)])
    assert tabs._description(state, "a dog on the beach") == "Result for 'a dog on the beach', seed 3"
    assert tabs._description(GenerationState([ImageState()]), "a dog") == "Preview for 'a dog'"
    captions = [caption for _, caption in tabs._draw_results(state, "a dog on the beach", ["dog"])]
    assert captions == ["Result for 'a dog on the beach', seed 3", "Guidance masks of dog, seed 3"]
    html = progress("Done", 1, ["dog"], 'Result for "a dog"')
    assert 'data-description="Result for &quot;a dog&quot;"' in html and 'data-masks="Guidance masks of dog.' in html


class FailingClient:
    """A client whose images fail, after a preview if `late`."""

    def __init__(self, error: Exception, late: bool) -> None:
        self._error, self._late = error, late

    async def stream(self, request, *, previews=True, timeout_s=None):
        if self._late:
            yield Queued(0)
            yield Progress(1, 4, subject_image("red"), ())
        raise self._error


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("the size is invalid."),
        QueueFull("the queue is full."),
        DeadlineExceeded("the deadline has passed."),
        Unavailable("the replica was lost."),
        ServerError("the server failed."),
        KeyError("a bug"),
    ],
)
def test_every_error_ends_in_a_usable_page(error, late):
    """Generate is enabled, Stop is disabled, and the status line has the message."""
    values = ("a dog runs", subject(), ["dog"], "", *SETTINGS)
    updates = updates_until_error(FailingClient(error, late), values)
    assert updates[0][-2].interactive is False and updates[0][-1].interactive is True
    message = "Internal error; see the log of the demo." if isinstance(error, KeyError) else str(error)
    assert_usable(updates[-1], message)


def test_invalid_input_ends_in_a_usable_page(client):
    values = ("a dog runs", upload(b"text", "cat.png"), ["dog"], "", *SETTINGS)
    assert_usable(updates_until_error(client, values)[-1], "cat.png is not an image")


def test_success_ends_in_a_usable_page_with_the_image(client):
    async def run():
        values = ("a dog runs", subject(), ["dog"], "", *SETTINGS)
        async with aclosing(tabs.generate_updates(ONE, client, LIMITS, values)) as updates:
            return [update async for update in updates]

    last = asyncio.run(run())[-1]
    assert_usable(last, "Done. Seeds 7, 8.")
    assert all(isinstance(image, Image.Image) for image in last[1:3]), "users of the API receive the last update"


def updates_until_error(client, values) -> list:
    seen = []

    async def run():
        async with aclosing(tabs.generate_updates(ONE, client, LIMITS, values)) as updates:
            async for update in updates:
                seen.append(update)

    with pytest.raises(tabs.gr.Error):
        asyncio.run(run())
    return seen


def assert_usable(update: list, message: str) -> None:
    status, *_, generate, stop = update
    assert message in status
    assert generate.interactive is True and stop.interactive is False


@pytest.fixture(scope="module")
def page(client):
    """The page, not launched."""
    return build_demo(client, info(vocabulary=VOCABULARY))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_api_has_named_parameters_and_accepts_words_of_any_prompt(page, task):
    endpoints = page.get_api_info()["named_endpoints"]
    assert endpoints.keys() == {f"/{task.name.lower()}" for task in TASKS}
    parameters = {p["parameter_name"]: p for p in endpoints[f"/{task.name.lower()}"]["parameters"]}
    suffixes = [f"_{index + 1}" for index in range(task.num_slots)] if task.num_slots > 1 else [""]
    for suffix in suffixes:
        assert parameters[f"target_words{suffix}"]["type"]["items"] == {"type": "string"}
    required = {name for name, parameter in parameters.items() if not parameter["parameter_has_default"]}
    assert required == {"prompt", f"image{suffixes[0]}"}


def test_tabs_are_tools_of_mcp_clients(client):
    """A tool has named parameters, generates images, and returns the error of an invalid call as a sentence."""
    pytest.importorskip("mcp", reason="needs the extra mcp")
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    data = f"data:image/png;base64,{base64.b64encode(image_file(subject_image())).decode()}"
    arguments = {"prompt": "a dog runs", "image": data, "target_words": ["dog"], "steps": 2, "seed": "3"}
    demo = build_demo(client, info(vocabulary=VOCABULARY))
    address = launch_demo(demo, LIMITS, mcp=True)

    async def run():
        async with (
            streamablehttp_client(f"{address}/gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = {tool.name: tool.inputSchema for tool in (await session.list_tools()).tools}
            result = await session.call_tool("one2one", arguments | {"size": "64x64", "early_stop_step": 1})
            return tools, result, await session.call_tool("one2one", arguments | {"target_words": ["cow"]})

    tools, result, error = asyncio.run(run())
    demo.close()
    assert tools.keys() == {task.name.lower() for task in TASKS}
    assert {"prompt", "image", "target_words", "size", "seed"} <= tools["one2one"]["properties"].keys()
    assert not result.isError and "Done. Seed 3." in str(result.content)
    assert error.isError and "'cow' does not occur" in error.content[0].text


def test_temporary_files_are_deleted(page):
    assert page.delete_cache is not None


def test_a_result_is_in_the_gallery_only_after_the_next_click():
    """One result is shown by the live image; of several, which are shown as tiles, each one is in the gallery."""
    image = (subject_image(), "seed 1")
    latest, gallery, _ = tabs._add_results([image, image], None)
    assert latest == [image, image] and gallery == tabs.gr.skip()
    latest, gallery, *live = tabs._archive(latest, None)
    assert latest == [] and len(gallery.value) == 2 and gallery.visible and live == [None, None]
    latest, gallery, _ = tabs._add_results([image] * 4, [image])
    assert latest == [] and len(gallery.value) == 5


def test_chips_of_one_image_have_the_colors_of_their_masks():
    for index, color in enumerate(SUBJECT_COLORS):
        selector = " ~ ".join(["label.selected"] * (index + 1))
        assert f".words-multiple {selector} {{ background: {color} " in CSS


def test_examples_have_alternative_texts(page):
    texts = [block.value for block in page.blocks.values() if "<img" in str(getattr(block, "value", ""))]
    assert len(texts) == sum(len(task.examples) for task in TASKS)
    assert any('alt="Reference image of dog and robot"' in text for text in texts)
