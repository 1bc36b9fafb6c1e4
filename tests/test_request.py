"""A request is checked where it is made, and says what is wrong."""

import numpy as np
import pytest
from PIL import Image
from tiny import subject_image

from realcustom import Request, SamplingDefaults, Subject
from realcustom.reference_image import to_rgb

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
        ({"subjects": ("dog",)}, "Subject objects"),
    ],
)
def test_bad_settings_are_refused_with_their_value(changes, message):
    with pytest.raises(ValueError, match=message):
        Request(**{"prompt": "a dog", "subjects": (subject(),), **changes})


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
def test_bad_subjects_are_refused_with_their_value(changes, message):
    with pytest.raises(ValueError, match=message):
        subject(**changes)


def test_two_subjects_cannot_become_the_same_word():
    with pytest.raises(ValueError, match="overlaps"):
        Request(prompt="a red dog", subjects=(subject(), subject(target_phrase="red dog")))


@pytest.mark.parametrize(
    "stop,steps,whole",
    [(None, 25, 12), (None, 4, 2), (None, 1, 1), (0.5, 10, 5), (1.0, 8, 8), (6, 10, 6), (99, 10, 10)],
)
def test_early_stop_becomes_whole_steps(stop, steps, whole):
    request = Request(prompt="a dog", num_inference_steps=steps, early_stop_step=stop).resolve(DEFAULTS)
    assert request.early_stop_step == whole


def test_every_open_setting_is_filled_and_the_rest_kept():
    request = Request(prompt="a dog", subjects=(subject(scope_ratio=0.4),), seed=7).resolve(DEFAULTS)
    assert None not in vars(request).values()
    assert (request.seed, request.subjects[0].scope_ratio, request.height) == (7, 0.4, DEFAULTS.height)


def test_transparency_is_laid_on_white_and_exif_rotation_applied():
    clear = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (4, 2))
    turned.getexif()[0x0112] = 6
    assert to_rgb(turned).size == (2, 4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = (
        Image.new(mode, (3, 2))
        if mode.startswith("I;")
        else Image.new("RGB", (3, 2), "white").convert("L" if mode in "IF" else "RGB").convert(mode)
    )
    assert to_rgb(image).mode == "RGB"
    assert to_rgb(image).size == (3, 2)


def test_sixteen_bits_keep_their_brightness():
    gray = Image.fromarray(np.full((2, 2), 32768, dtype=np.uint16))
    assert abs(to_rgb(gray).getpixel((0, 0))[0] - 128) <= 1
