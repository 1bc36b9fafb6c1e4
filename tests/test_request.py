"""Requests, subjects and reference images: validation, normalization and resolution."""

import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tiny import subject_image

from realcustom import Request, SamplingDefaults, Subject, reference_image
from realcustom.reference_image import ReferenceImage, to_rgb
from realcustom.request import seed_variations

DEFAULTS = SamplingDefaults(num_inference_steps=25, early_stop_step=12)


def subject(**changes) -> Subject:
    return Subject(**{"image": subject_image(), "target_phrase": "dog", **changes})


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": 3}, "prompt must be text"),
        ({"prompt": "a cat"}, "does not occur"),
        ({"height": 0}, "height is 0"),
        ({"width": 1.5}, "width is 1.5"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": True}, "num_inference_steps is True"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"early_stop_step": 0}, "early_stop_step is 0"),
        ({"early_stop_step": 1.5}, "early_stop_step is 1.5"),
        ({"early_stop_step": float("nan")}, "early_stop_step is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is"),
        ({"early_stop_step": 10**400}, "early_stop_step is 1000"),
        ({"num_inference_steps": 10**400}, "num_inference_steps is 1000"),
        ({"height": 10**5000}, "height is too large"),
        ({"guidance_scale": 10**400}, "guidance_scale is 1000"),
        ({"mask_source": "x" * 10_000}, "mask_source is 'xxx"),
        ({"subjects": ("dog",)}, "Subject objects"),
    ],
)
def test_invalid_settings_raise_with_their_value(changes, message):
    """A setting out of range raises a ValueError that names the setting and its value."""
    with pytest.raises(ValueError, match=message) as error:
        Request(**{"prompt": "a dog", "subjects": (subject(),), **changes})
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"image": "dog.png"}, "must be a PIL image"),
        ({"target_phrase": " "}, "target_phrase is empty"),
        ({"scope_ratio": 0.0}, "scope_ratio is 0.0"),
        ({"scope_ratio": 1.1}, "scope_ratio is 1.1"),
        ({"scope_ratio": "much"}, "scope_ratio is 'much'"),
    ],
)
def test_invalid_subjects_raise_with_their_value(changes, message):
    """An invalid subject raises a ValueError that names the field and its value."""
    with pytest.raises(ValueError, match=message):
        subject(**changes)


def test_overlapping_target_phrases_raise():
    """Two subjects must not share a word of the prompt."""
    with pytest.raises(ValueError, match="overlaps"):
        Request(prompt="a red dog", subjects=(subject(), subject(target_phrase="red dog")))


@pytest.mark.parametrize(
    "stop,steps,expected",
    [(None, 25, 12), (None, 4, 2), (None, 1, 1), (0.5, 10, 5), (1.0, 8, 8), (6, 10, 6), (99, 10, 10)],
)
def test_early_stop_resolves_to_a_number_of_steps(stop, steps, expected):
    """T_stop as None, a fraction or a number resolves to a number of steps in [1, num_inference_steps]."""
    request = Request(prompt="a dog", num_inference_steps=steps, early_stop_step=stop).resolve(DEFAULTS)
    assert request.early_stop_step == expected


def test_resolve_fills_unset_settings_and_keeps_the_others():
    """Set values are kept and unset ones are the defaults, for requests and subjects."""
    subjects = (subject(scope_ratio=0.4), subject(target_phrase="cat"))
    request = Request(prompt="a dog, a cat", subjects=subjects, seed=7).resolve(DEFAULTS)
    assert (request.seed, request.height) == (7, DEFAULTS.height)
    assert [s.scope_ratio for s in request.subjects] == [0.4, DEFAULTS.scope_ratio]


@pytest.mark.parametrize("subjects", [(), (subject(),)])
def test_resolved_requests_contain_no_none(subjects):
    """A resolved request has a value for every setting, including the seed and the scope of each subject."""
    request = Request(prompt="a dog", subjects=subjects).resolve(DEFAULTS)
    for value in (request, *request.subjects):
        assert None not in vars(value).values()


def test_reference_images_are_normalized_exactly_once(monkeypatch):
    """Constructing a subject normalizes its image; no later copy of the subject or the request does so again.

    A `ReferenceImage` that was normalized before is never normalized again.
    """
    calls = []

    def counting_to_rgb(image):
        calls.append(image)
        return to_rgb(image)

    monkeypatch.setattr(reference_image, "to_rgb", counting_to_rgb)
    first = subject()
    assert len(calls) == 1
    copies = [replace(first, scope_ratio=0.5), Subject(image=first.image, target_phrase="cat")]
    request = replace(Request(prompt="a dog, a cat", subjects=copies), seed=7)
    resolved = request.resolve(DEFAULTS)
    variations = [*seed_variations(request.with_seed(), 3), *seed_variations(resolved, 3), replace(resolved, seed=1)]
    assert len(calls) == 1
    assert all(s.image is first.image for r in (request, resolved, *variations) for s in r.subjects)
    normalized = ReferenceImage.from_pil(subject_image())
    assert len(calls) == 2
    assert Subject(image=normalized, target_phrase="dog").image is normalized
    assert len(calls) == 2


def test_transparency_is_composited_on_white():
    """Fully transparent pixels become white, whatever their color."""
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied():
    """An image whose EXIF orientation is a quarter turn swaps width and height."""
    rotated = Image.new("RGB", (4, 2))
    rotated.getexif()[0x0112] = 6
    assert to_rgb(rotated).size == (2, 4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"])
def test_every_pil_mode_converts_to_rgb(mode):
    """`to_rgb` accepts every PIL mode and keeps the size."""
    image = (
        Image.new(mode, (3, 2))
        if mode.startswith("I;")
        else Image.new("RGB", (3, 2), "white").convert("L" if mode in "IF" else "RGB").convert(mode)
    )
    assert to_rgb(image).mode == "RGB"
    assert to_rgb(image).size == (3, 2)


def test_16_bit_images_keep_their_brightness():
    """16-bit gray values are scaled to 8 bits, not clipped."""
    gray = Image.fromarray(np.full((2, 2), 32768, dtype=np.uint16))
    assert abs(to_rgb(gray).getpixel((0, 0))[0] - 128) <= 1


def test_checks_take_linear_time_and_short_messages():
    """A prompt of 200,000 characters with 100,000 occurrences is checked in linear time and not echoed."""
    prompt = "a " * 100_000
    start = time.process_time()
    Request(prompt=prompt, subjects=(subject(target_phrase="a"),))
    with pytest.raises(ValueError, match="does not occur") as missing:
        Request(prompt=prompt, subjects=(subject(target_phrase="dog"),))
    with pytest.raises(ValueError, match="overlaps") as overlap:
        Request(prompt=prompt, subjects=(subject(target_phrase="a"), subject(target_phrase="a a")))
    assert time.process_time() - start < 5
    assert max(len(str(missing.value)), len(str(overlap.value))) < 500
