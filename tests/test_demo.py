"""The page's own logic, on a real engine with the toy pipeline."""

import asyncio
from contextlib import aclosing

import numpy as np
import pytest
from PIL import Image
from tiny import subject_image, tiny_pipeline

from demo.components import progress, side_by_side, tiled
from demo.generation_state import generate_images
from demo.mask_overlay import SUBJECT_COLORS, overlay_masks
from demo.tabs import Task, _read
from serving.clients import InvalidRequest, Queued, Request, Subject
from serving.engine.engine import Engine

SETTINGS = (0.5, 2, 3.0, 4, True, "7", "", 2)  # scope, T_stop, CFG, steps, fast masks, seed, negative prompt, images
ONE = Task(name="One", text="", num_slots=1, many_words=False)
MANY = Task(name="Many", text="", num_slots=1, many_words=True)
SLOTS = Task(name="Slots", text="", num_slots=2, many_words=False)


@pytest.fixture(scope="module")
def engine():
    engine = Engine(tiny_pipeline())
    yield engine
    engine.close()


def test_a_chosen_word_becomes_a_subject_with_the_pages_settings():
    request, number = _read(ONE, ("a dog runs", subject_image(), "dog", "", *SETTINGS))
    assert [s.target_phrase for s in request.subjects] == ["dog"]
    assert (request.subjects[0].scope_ratio, request.early_stop_step, request.guidance_scale) == (0.5, 2, 3.0)
    assert (request.num_inference_steps, request.seed, number) == (4, 7, 2)
    assert request.mask_source == "generation_branch"


def test_several_words_share_one_image_and_a_phrase_replaces_clicks():
    clicked, _ = _read(MANY, ("a red dog and a cat", subject_image(), ["dog", "cat"], "", *SETTINGS))
    typed, _ = _read(MANY, ("a red dog and a cat", subject_image(), ["dog"], "red dog, cat", *SETTINGS))
    assert [s.target_phrase for s in clicked.subjects] == ["dog", "cat"]
    assert [s.target_phrase for s in typed.subjects] == ["red dog", "cat"]


def test_empty_slots_are_left_out():
    request, _ = _read(SLOTS, ("a dog and a cat", subject_image(), "dog", "", None, None, "", *SETTINGS))
    assert len(request.subjects) == 1


@pytest.mark.parametrize(
    "values,message",
    [
        (("a dog", None, "dog", ""), "Add an image for 'dog'"),
        (("a dog", subject_image(), None, ""), "Click the word .*: a, dog"),
        (("", None, None, ""), "Write a prompt"),
        (("a dog", None, None, ""), "Add an image of the subject"),
    ],
)
def test_what_is_missing_is_said(values, message):
    with pytest.raises(InvalidRequest, match=message):
        _read(ONE, (*values, *SETTINGS))


def test_no_seed_draws_one_and_what_is_none_is_refused():
    values = ["a dog runs", subject_image(), "dog", "", *SETTINGS]
    read = lambda seed: _read(ONE, (*values[:9], seed, *values[10:]))[0]
    assert read("").seed is None and read(None).seed is None and read(" 12 ").seed == 12
    for wrong in ("-1", "1.5", "lucky"):
        with pytest.raises(InvalidRequest, match=f"seed is '{wrong}'.*whole number"):
            read(wrong)


def dog(seed=1) -> Request:
    return Request(prompt="a dog", subjects=(Subject(image=subject_image(), target_phrase="dog"),), seed=seed)


def test_several_images_use_consecutive_seeds_and_end_together(engine):
    async def run():
        async with aclosing(generate_images(engine, dog(seed=5), 3)) as states:
            return [(s.status(), [p.seed for p in s.images], s.fraction) async for s in states]

    seen = asyncio.run(run())
    assert seen[-1] == ("Done. Seeds 5, 6, 7.", [5, 6, 7], 1)
    assert any(status.startswith("Step") for status, *_ in seen)
    fractions = [fraction for *_, fraction in seen]
    assert fractions == sorted(fractions) and fractions[0] < 1


def test_stopping_frees_the_engine(engine):
    """Closing the stream in the middle, as the stop button does, leaves nothing under way."""

    async def run():
        request = Request(prompt="a dog", num_inference_steps=100, seed=1)
        async with aclosing(generate_images(engine, request, 2)) as states:
            async for state in states:
                if any(p.step for p in state.images):
                    break
        for _ in range(100):
            stats = engine.stats()
            if not (stats["waiting"] or stats["preparing"] or stats["active"]):
                return True
            await asyncio.sleep(0.02)
        return False

    assert asyncio.run(run())


@pytest.mark.parametrize("ticks", range(8))
def test_stopping_is_heard_whenever_it_comes(ticks):
    """Also in the very moment in which an event wakes the page: some turns of the event loop after it was sent."""

    class Steady:
        def __init__(self):
            self.sent = asyncio.Event()

        async def stream(self, request, previews):
            await self.sent.wait()
            yield Queued(0)
            await asyncio.sleep(60)

    async def run():
        client = Steady()

        async def watch():
            async with aclosing(generate_images(client, dog(), 1)) as states:
                async for _ in states:
                    pass

        watching = asyncio.create_task(watch())
        await asyncio.sleep(0.05)
        client.sent.set()
        for _ in range(ticks):
            await asyncio.sleep(0)
        watching.cancel()
        done, _ = await asyncio.wait({watching}, timeout=5)
        assert done and watching.cancelled()

    asyncio.run(run())


def test_an_error_of_one_image_reaches_the_page(engine):
    async def run():
        async with aclosing(generate_images(engine, Request(prompt="a dog", height=65, seed=1), 2)) as states:
            async for _ in states:
                pass

    with pytest.raises(InvalidRequest, match="height is 65 px"):
        asyncio.run(run())


def test_masks_are_shown_in_their_subjects_colours_and_only_there():
    image = Image.new("RGB", (20, 10), "white")
    left = Image.new("L", (20, 10))
    left.paste(255, (0, 0, 10, 10))
    shown = np.asarray(overlay_masks(image, [left])).astype(int)
    color = np.array([int(SUBJECT_COLORS[0][i : i + 2], 16) for i in (1, 3, 5)])
    assert np.abs(shown[5, 15] - 255).max() <= 1
    assert np.abs(shown[5, 5] - color).sum() < np.abs(shown[5, 5] - 255).sum()


def test_progress_fills_its_bar_and_shows_text_as_text():
    assert "width: 25.0%" in progress("Step 1 of 4", 0.25)
    assert "<b>" not in progress("<b>", 0)


def test_thumbnails_stand_side_by_side_in_order():
    row = side_by_side([subject_image("red"), subject_image("blue")], side=32)
    red, blue = subject_image("red").resize((32, 32)), subject_image("blue").resize((32, 32))
    assert row.size == (64, 32)
    for place, wanted in ((0, red), (32, blue)):
        shown = np.asarray(row.crop((place, 0, place + 32, 32))).astype(int)
        assert np.abs(shown - np.asarray(wanted.convert("RGB"))).mean() < 8


def test_images_under_way_keep_their_places_in_the_grid():
    """Two of three are there: each in its own place, the missing one white; one alone is shown as it is."""
    red, blue = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")
    grid = tiled([red, None, blue])
    assert grid.size == (16, 12)
    colors = [grid.getpixel(place) for place in ((1, 1), (9, 1), (1, 7), (9, 7))]
    assert colors == [(255, 0, 0), (255, 255, 255), (0, 0, 255), (255, 255, 255)]
    assert tiled([red]) is red
