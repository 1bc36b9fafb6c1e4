"""The HTTP interface without Ray: invalid input returns one clear sentence, valid input returns an image."""

import asyncio
import base64
import errno
import io
import json
import struct
import subprocess
import zlib
from dataclasses import replace

import httpx
import numpy as np
import pytest
import starlette.datastructures
from PIL import Image, features
from tiny import subject_image, tiny_pipeline

import serving.http.edit_form
import serving.protocol.decode_process
import serving.protocol.image_codec
from serving.clients import HttpClient, QueueFull, Request, Subject
from serving.http.app import create_api
from serving.protocol.image_codec import from_base64
from serving.replica import Replica
from serving.settings import Settings

PROMPT = "a dog and a cat"


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    (folder / "vocabulary.json").write_text(json.dumps({"subjects": ["dog"], "scenes": ["beach"]}))
    return Settings(
        model=str(folder),
        device="cpu",
        max_batch_size=4,
        max_queued=4,
        max_images=3,
        max_subjects=3,
        max_steps=50,
        max_pixels=128 * 128,
        max_image_bytes=200_000,
        max_reference_pixels=1_000_000,
    )


@pytest.fixture(scope="module")
def replica(settings):
    replica = Replica(settings)
    yield replica
    replica.check_health()
    stats = asyncio.run(replica.stats())
    assert not any(stats[state] for state in ("waiting", "preparing", "active")), stats
    replica.close()


@pytest.fixture(scope="module")
def api(replica, settings):
    return create_api(replica, settings)


def call(api, method, path, **options) -> httpx.Response:
    async def run():
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.request(method, path, **options)

    return asyncio.run(run())


def file_of(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def edit(api, images=(), **fields) -> httpx.Response:
    """POST with `images` as file contents; fields that are None are omitted."""
    fields = {"prompt": PROMPT, "seed": "5", **fields}
    files = [("image", (f"{i}.png", data, "image/png")) for i, data in enumerate(images)]
    fields = {k: v for k, v in fields.items() if v is not None}
    if not files:  # a form without files, still multipart
        files = [
            (k, (None, v)) for k, values in fields.items() for v in (values if isinstance(values, list) else [values])
        ]
        fields = {}
    return call(api, "POST", "/v1/images/edits", data=fields, files=files)


DOG = file_of(subject_image())


def bomb() -> bytes:
    """A PNG of a few bytes that declares 60000 x 60000 pixels."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0" * 9)) + chunk(b"IEND", b"")


BAD = {
    "no prompt": (dict(prompt=None, images=[DOG], target_phrase="dog"), "prompt"),
    "empty prompt": (dict(prompt="", images=[DOG], target_phrase="dog"), "prompt"),
    "blank prompt": (dict(prompt="  ", images=[DOG], target_phrase="dog"), "prompt"),
    "long prompt": (dict(prompt="a dog " * 1000, images=[DOG], target_phrase="dog"), "characters"),
    "word beyond the encoder": (dict(prompt="a " + 9 * "very " + "dog", images=[DOG], target_phrase="dog"), "dog"),
    "phrase missing in prompt": (dict(images=[DOG], target_phrase="horse"), "horse"),
    "half a word": (dict(images=[DOG], target_phrase="do"), "do"),
    "empty phrase": (dict(images=[DOG], subjects='[{"target_phrase": ""}]'), "target_phrase"),
    "image without phrase": (dict(images=[DOG]), "target_phrase"),
    "phrase without image": (dict(target_phrase="dog"), "image"),
    "fewer phrases": (dict(images=[DOG, DOG], target_phrase="dog"), "phrase"),
    "same word twice": (dict(images=[DOG, DOG], target_phrase=["dog", "dog"]), "overlaps"),
    "huge guidance": (dict(guidance_scale="1e308"), "at most 100"),
    "large guidance": (dict(guidance_scale="1e30"), "at most 100"),
    "subjects not JSON": (dict(images=[DOG], subjects="dog"), "JSON"),
    "subjects deep JSON": (dict(images=[DOG], subjects="[" * 100_000), "JSON"),
    "subjects not a list": (dict(images=[DOG], subjects='{"target_phrase": "dog"}'), "list"),
    "subjects of text": (dict(images=[DOG], subjects='["dog"]'), "subjects"),
    "subjects with a typo": (dict(images=[DOG], subjects='[{"target": "dog"}]'), "subjects"),
    "image index": (dict(images=[DOG], subjects='[{"target_phrase": "dog", "image": 1}]'), "image 1"),
    "negative index": (dict(images=[DOG], subjects='[{"target_phrase": "dog", "image": -1}]'), "image -1"),
    "unused image": (dict(images=[DOG, DOG], subjects='[{"target_phrase": "dog", "image": 0}]'), "image 1"),
    "both forms": (dict(images=[DOG], subjects='[{"target_phrase": "dog"}]', target_phrase="dog"), "both"),
    "too many subjects": (dict(images=[DOG], target_phrase=["a", "dog", "and", "cat"]), "subjects"),
    "scope 0": (dict(images=[DOG], target_phrase="dog", scope_ratio="0"), "scope_ratio"),
    "scope 2": (dict(images=[DOG], target_phrase="dog", scope_ratio="2"), "scope_ratio"),
    "scope nan": (dict(images=[DOG], target_phrase="dog", scope_ratio="nan"), "scope_ratio"),
    "scope text": (dict(images=[DOG], target_phrase="dog", scope_ratio="big"), "scope_ratio"),
    "scopes do not match": (dict(images=[DOG], target_phrase="dog", scope_ratio=["0.1", "0.2"]), "scope_ratio"),
    "size text": (dict(size="large"), "size"),
    "size odd": (dict(size="65x64"), "65"),
    "size 0": (dict(size="0x0"), "height is 0"),
    "size small": (dict(size="8x8"), "8x8"),
    "size large": (dict(size="4096x4096"), "pixels"),
    "size negative": (dict(size="-64x64"), "size"),
    "n 0": (dict(n="0"), "n is"),
    "n large": (dict(n="100"), "n is 100"),
    "n text": (dict(n="two"), "n is 'two'"),
    "steps 0": (dict(num_inference_steps="0"), "num_inference_steps"),
    "steps many": (dict(num_inference_steps="1000"), "num_inference_steps"),
    "steps half": (dict(num_inference_steps="2.5"), "num_inference_steps"),
    "mask source": (dict(mask_source="magic"), "mask_source"),
    "mask interval 0": (dict(mask_interval="0"), "mask_interval"),
    "stop 0": (dict(early_stop_step="0"), "early_stop_step"),
    "stop fraction": (dict(early_stop_step="1.5"), "early_stop_step"),
    "stop nan": (dict(early_stop_step="nan"), "early_stop_step"),
    "stop huge": (dict(early_stop_step="1" + "0" * 400), "early_stop_step"),
    "stop of 5000 digits": (dict(early_stop_step="1" + "0" * 5000), "early_stop_step"),
    "steps huge": (dict(num_inference_steps="1" + "0" * 400), "num_inference_steps"),
    "n huge": (dict(n="1" + "0" * 400), "n is"),
    "interval huge": (dict(mask_interval="1" + "0" * 400), "mask_interval"),
    "guidance huge": (dict(guidance_scale="1" + "0" * 400), "guidance_scale"),
    "timeout huge": (dict(timeout_s="1" + "0" * 400), "timeout_s"),
    "image index huge": (dict(images=[DOG], subjects=f'[{{"target_phrase": "dog", "image": 1{"0" * 400}}}]'), "image"),
    "scope huge": (dict(images=[DOG], subjects=f'[{{"target_phrase": "dog", "scope_ratio": 1{"0" * 400}}}]'), "scope"),
    "stop text": (dict(early_stop_step="soon"), "early_stop_step"),
    "guidance half": (dict(guidance_scale="0.5"), "guidance_scale"),
    "guidance inf": (dict(guidance_scale="inf"), "guidance_scale"),
    "seed negative": (dict(seed="-1"), "seed"),
    "seed huge": (dict(seed=str(2**63)), "seed"),
    "seed text": (dict(seed="x"), "seed"),
    "model": (dict(model="gpt-image-1"), "gpt-image-1"),
    "url response": (dict(response_format="url"), "response_format"),
    "output format": (dict(output_format="bmp"), "output_format"),
    "stream maybe": (dict(stream="maybe"), "stream"),
    "unknown field": (dict(promt="a dog"), "promt"),
    "text as image": (dict(image="hello"), "image.0 is not a file"),
    "long text as image": (dict(image="x" * 10_000), "image.0 is not a file"),
    "long field name": (dict(**{"x" * 1000: "a dog"}), "not a known field"),
    "long model": (dict(model="x" * 10_000), "not loaded"),
    "long size": (dict(size="x" * 10_000), "size"),
    "long choice": (dict(mask_source="x" * 10_000), "mask_source"),
    "long phrase": (dict(images=[DOG], target_phrase="x" * 10_000), "target_phrase"),
    "long phrase, no image": (
        dict(images=[DOG], subjects=f'[{{"target_phrase": "{"x" * 999}", "image": 9}}]'),
        "image 9",
    ),
    "long key": (dict(images=[DOG], subjects=f'[{{"{"x" * 1000}": 1}}]'), "subjects"),
    "half a surrogate pair": (
        dict(images=[DOG], subjects='[{"target_phrase": "dog \\ud83d", "image": 0}]'), "surrogate"
    ),
    "empty file": (dict(images=[b""], target_phrase="dog"), "empty"),
    "not an image": (dict(images=[b"hello" * 100], target_phrase="dog"), "not an image"),
    "svg": (dict(images=[b"<svg xmlns='http://www.w3.org/2000/svg'/>"], target_phrase="dog"), "not an image"),
    "eps": (dict(images=[b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"], target_phrase="dog"), "not an image"),
    "truncated png": (dict(images=[DOG[: len(DOG) // 2]], target_phrase="dog"), "image 0"),
    "truncated jpeg": (dict(images=[file_of(subject_image(), "JPEG")[:300]], target_phrase="dog"), "image 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("stream", ["false", "true"])
def test_bad_input_is_422_with_a_sentence(api, name, stream):
    """Invalid input gets status 422 and a message in the shape of OpenAI's errors that names it, streaming or not."""
    fields, words = BAD[name]
    response = edit(api, **{"stream": stream, **fields})
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert words in error["message"] and "\n" not in error["message"] and "Traceback" not in error["message"]
    assert len(json.dumps(error)) < 500 and "UploadFile" not in error["message"]


TOO_LARGE = {
    "file bytes": file_of(Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8))),
    "bomb": bomb(),
    "pixels": file_of(Image.new("L", (1200, 1200))),
}


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the files that have been decoded."""
    names = []
    decode = serving.http.edit_form.decode_image

    def record(file, limits, name):
        names.append(name)
        return decode(file, limits, name)

    monkeypatch.setattr(serving.http.edit_form, "decode_image", record)
    return names


def test_the_pixels_of_all_references_are_limited(replica, settings, decoded):
    """Files with too many pixels in total are rejected by their headers, before any of them is decoded."""

    class Limited:
        stream, reserve = replica.stream, replica.reserve

        async def model(self):
            return (await replica.model()).with_limits(
                settings.limits.model_copy(update={"max_reference_pixels_total": 1_500_000})
            )

    api = create_api(Limited(), settings)
    files = [file_of(Image.new("L", size)) for size in ((900, 900), (800, 900))]
    response = edit(api, files, target_phrase=["dog", "cat"])
    assert response.status_code == 413 and "1530000 pixels in total" in response.text and not decoded
    response = edit(api, [files[0], DOG], target_phrase=["dog", "cat"], num_inference_steps="1")
    assert response.status_code == 200 and decoded == ["image 0 ('0.png')", "image 1 ('1.png')"]


@pytest.mark.parametrize("stream", ["false", "true"])
def test_the_references_of_all_requests_are_limited(replica, settings, decoded, stream):
    """While a request holds references, another one that would exceed the memory gets 429 before its references are
    decoded. The memory is free when the request has ended."""
    api = create_api(replica, settings.model_copy(update={"reference_memory_gb": 1.5 * 3 * 900 * 900 / 2**30}))
    large = file_of(Image.new("L", (900, 900)))

    async def run():
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:

            def post(steps: str):
                form = {"prompt": PROMPT, "target_phrase": "dog", "num_inference_steps": steps, "stream": stream}
                return http.post("/v1/images/edits", data=form, files={"image": ("dog.png", large, "image/png")})

            first = asyncio.create_task(post("50"))
            while not decoded:
                await asyncio.sleep(0.001)
            refused = await post("1")
            assert refused.status_code == 429 and "references" in refused.text and len(decoded) == 1
            assert (await first).status_code == 200 and (await post("1")).status_code == 200

    asyncio.run(run())


@pytest.mark.parametrize(
    "fields",
    [
        dict(target_phrase="horse"),
        dict(target_phrase="dog", num_inference_steps="1000"),
        dict(target_phrase="dog", size="8x8"),
        dict(target_phrase="dog", scope_ratio="2"),
        dict(target_phrase="dog", model="another"),
    ],
    ids=lambda fields: next(reversed(fields)),
)
def test_images_of_an_invalid_request_are_not_decoded(api, decoded, fields):
    assert edit(api, [DOG], **fields).status_code == 422 and not decoded


@pytest.mark.parametrize("name", TOO_LARGE)
def test_too_large_is_413(api, name):
    """Files with too many bytes or pixels are rejected without being decoded."""
    response = edit(api, [TOO_LARGE[name]], target_phrase="dog")
    assert response.status_code == 413 and "image 0" in response.json()["error"]["message"]


LONG = {
    "prompt": dict(prompt="a " * 100_000, target_phrase="a"),
    "negative prompt": dict(negative_prompt="a " * 100_000, target_phrase="dog"),
    "phrase": dict(target_phrase="a " * 100_000),
    "subjects": dict(subjects=json.dumps([{"target_phrase": "a " * 100_000}])),
    "phrase in subjects": dict(subjects=json.dumps([{"target_phrase": "a" * 2001}])),
}


@pytest.mark.parametrize("name", LONG)
def test_long_texts_are_rejected_unread(api, monkeypatch, name):
    """A text beyond `max_prompt_chars` is rejected before a request is constructed from it or an image is decoded."""

    def unexpected(*_, **__):
        raise AssertionError

    monkeypatch.setattr(serving.http.edit_form, "Request", unexpected)
    monkeypatch.setattr(serving.http.edit_form, "decode_image", unexpected)
    response = edit(api, [DOG], **LONG[name])
    assert response.status_code == 422 and "characters; this server accepts at most" in response.text, response.text


def test_long_file_names_are_not_repeated(api):
    response = call(
        api,
        "POST",
        "/v1/images/edits",
        data={"prompt": PROMPT, "target_phrase": "dog"},
        files=[("image", ("x" * 10_000, b"?", "image/png"))],
    )
    assert response.status_code == 422 and len(response.json()["error"]["message"]) < 400


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def out_of_memory(*_, **__):
    raise MemoryError


@pytest.mark.parametrize(
    "owner,name,error",
    [
        (starlette.datastructures.UploadFile, "write", full_disk),
        (Image.Image, "load", full_disk),
        (Image, "open", out_of_memory),
        (subprocess, "Popen", full_disk),
    ],
    ids=["storing", "decoding", "opening", "starting a process"],
)
def test_missing_resources_are_503_and_logged_once(api, monkeypatch, caplog, owner, name, error):
    """A full disk or exhausted memory is an error of the server: 503 with Retry-After, and one entry in the log."""
    data = file_of(Image.new("L", (1000, 999)))
    monkeypatch.setattr(serving.protocol.image_codec, "LARGE_PIXELS", 10_000 if owner is subprocess else 2**21)
    monkeypatch.setattr(owner, name, error)
    with caplog.at_level("ERROR"):
        response = edit(api, [data], target_phrase="dog")
    assert response.status_code == 503 and response.headers["retry-after"], response.text
    assert response.json()["error"]["type"] == "server_error" and "device" not in response.text
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_a_decoder_that_is_killed_is_503(api, monkeypatch):
    """If the decoding process ends for another reason than a damaged file, it is an error of the server."""
    monkeypatch.setattr(serving.protocol.image_codec, "LARGE_PIXELS", 10)
    monkeypatch.setattr(serving.protocol.decode_process.sys, "executable", "/bin/false")
    assert edit(api, [DOG], target_phrase="dog").status_code == 503


def test_too_long_body_is_413(api, settings):
    """A body that is too long is rejected, with and without a Content-Length."""
    too_many = settings.max_subjects * settings.max_image_bytes + 2**20 + 1

    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'

    async def chunks():
        yield head
        for _ in range(too_many // 2**16 + 1):
            yield b"-" * 2**16

    headers = {"content-type": "multipart/form-data; boundary=x"}
    for content in (head + b"-" * too_many, chunks()):
        response = call(api, "POST", "/v1/images/edits", content=content, headers=headers)
        assert response.status_code == 413, response.text


@pytest.mark.parametrize(
    "content", [b"", b"{", b"--x\r\nbroken", b"--x\r\nContent-Disposition: form-data\r\n\r\n\r\n--x--"]
)
@pytest.mark.parametrize(
    "kind", ["multipart/form-data; boundary=x", "multipart/form-data", "application/json", "text/x"]
)
def test_malformed_bodies_are_422(api, content, kind):
    """A body that is not a form is invalid input, not a server error."""
    response = call(api, "POST", "/v1/images/edits", content=content, headers={"content-type": kind})
    assert response.status_code == 422 and response.json()["error"]["message"]


def test_other_paths_and_methods_have_the_same_error_shape(api):
    assert call(api, "GET", "/v1/nothing").json()["error"]["message"]
    assert call(api, "GET", "/v1/images/edits").status_code == 405


GOOD_FILES = {
    "alpha": file_of(Image.new("RGBA", (40, 30), (200, 0, 0, 90))),
    "palette": file_of(subject_image().convert("P")),
    "palette with transparency": file_of(subject_image().convert("P"), transparency=0),
    "16 bit": file_of(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64))),
    "1 bit": file_of(subject_image().convert("1")),
    "cmyk": file_of(subject_image().convert("CMYK"), "JPEG"),
    "webp": file_of(subject_image(), "WEBP"),
    **({"avif": file_of(subject_image(), "AVIF")} if features.check("avif") else {}),
    "animation": file_of(subject_image(), "GIF", save_all=True, append_images=[subject_image("blue")]),
    "one pixel": file_of(Image.new("RGB", (1, 1))),
    "a line": file_of(Image.new("RGB", (1, 900))),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_every_kind_of_image_is_accepted(api, name):
    response = edit(api, [GOOD_FILES[name]], target_phrase="dog", num_inference_steps="1")
    assert response.status_code == 200, response.text


def test_exif_rotation_is_applied(api):
    """An image stored rotated with an EXIF tag gives the same result as the upright image."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 270 degrees to display
    upright = subject_image()
    sideways = upright.rotate(90, expand=True)
    responses = [
        edit(api, [data], target_phrase="dog").json()["data"][0]["b64_json"]
        for data in (DOG, file_of(sideways, exif=exif))
    ]
    assert responses[0] == responses[1]


def test_images_have_seeds_and_masks(api):
    """`n` images have consecutive seeds and one mask per subject; each equals the image requested alone."""
    response = edit(api, [DOG], target_phrase=["dog", "cat"], n="3").json()
    assert [item["seed"] for item in response["data"]] == [5, 6, 7]
    assert all(len(item["masks"]) == 2 for item in response["data"])
    alone = edit(api, [DOG], target_phrase=["dog", "cat"], seed="6").json()["data"][0]
    difference = np.asarray(from_base64(alone["b64_json"])).astype(int) - np.asarray(
        from_base64(response["data"][1]["b64_json"])
    )
    assert np.abs(difference).max() <= 1


def test_full_and_short_form_are_equivalent(api):
    """`subjects` and `target_phrase`, `image` and `image[]`, give the same image."""
    full = edit(api, [DOG], subjects='[{"target_phrase": "dog", "scope_ratio": 0.5}]').json()["data"]
    short = edit(api, [DOG], target_phrase="dog", scope_ratio="0.5").json()["data"]
    listed = call(
        api,
        "POST",
        "/v1/images/edits",
        data={"prompt": PROMPT, "seed": "5", "target_phrase": "dog", "scope_ratio": "0.5"},
        files=[("image[]", ("dog.png", DOG, "image/png"))],
    ).json()["data"]
    assert full == short == listed


def test_output_formats_and_size(api):
    for kind, name in (("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")):
        item = edit(api, output_format=kind, size="96x64", num_inference_steps="1").json()["data"][0]
        image = Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))
        assert image.format == name and image.size == (96, 64)


def events_of(response) -> list[dict]:
    return [json.loads(line[5:]) for line in response.text.splitlines() if line.startswith("data:")]


def test_stream_uses_openai_event_names(api):
    """Each image has partial images and a completed one, which equals the image without streaming."""
    response = edit(api, [DOG], target_phrase="dog", stream="true", partial_images="2", n="2", num_inference_steps="12")
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response)
    assert {event["type"] for event in events} <= {"image_edit.partial_image", "image_edit.completed"}
    done = {e["image_index"]: e for e in events if e["type"] == "image_edit.completed"}
    plain = edit(api, [DOG], target_phrase="dog", n="2", num_inference_steps="12").json()["data"]
    for i in range(2):
        assert done[i]["seed"] == 5 + i and done[i]["size"] == "64x64"
        assert done[i]["b64_json"] == plain[i]["b64_json"] or n_close(done[i]["b64_json"], plain[i]["b64_json"])
        partial = [e["partial_image_index"] for e in events if e["image_index"] == i and "partial_image_index" in e]
        assert partial == list(range(len(partial))) and len(partial) <= 2


def n_close(a: str, b: str) -> bool:
    return np.abs(np.asarray(from_base64(a)).astype(int) - np.asarray(from_base64(b))).max() <= 1


def test_progress_events_on_request(api):
    events = events_of(edit(api, stream="true", progress="true", previews="true", num_inference_steps="9"))
    steps = [e["step"] for e in events if e["type"] == "image_edit.progress"]
    assert steps == list(range(1, 10)) and events[0] == {"type": "image_edit.queued", "position": 0, "image_index": 0}


LONG_PROMPT = "a dog on a mat and a very red kite"  # 27 tokens; the tiny text encoder reads 24


@pytest.mark.parametrize("stream", ["false", "true"])
def test_truncated_prompts_are_reported(api, stream):
    """The response, or the last event of a stream, names the last word of each text that the text encoder reads."""
    response = edit(api, prompt=LONG_PROMPT, negative_prompt="x " * 40, stream=stream)
    image = events_of(response)[-1] if stream == "true" else response.json()["data"][0]
    prompt, negative = image["warnings"]
    assert prompt.startswith("prompt has 27 tokens; the text encoder reads 24, up to the word 'red'"), prompt
    assert negative.startswith("negative_prompt has 42 tokens") and len(negative) < 300
    assert edit(api).json()["data"][0]["warnings"] == []


def test_prompt_length(api):
    """The length of a prompt is available without generating an image; invalid input is 422."""
    headers = {"content-type": "application/json"}
    ask = lambda **options: call(api, "POST", "/v1/prompt_length", headers=headers, **options)
    length = ask(json={"prompt": LONG_PROMPT}).json()
    assert length == {"num_tokens": 27, "max_tokens": 24, "num_chars_read": LONG_PROMPT.index("ite")}
    assert ask(json={"prompt": ""}).json()["num_chars_read"] == 0
    bad = [{"json": {"prompt": "a" * 5000}}, {"json": {}}, {"json": {"prompt": 5}}, {"content": b"{" * 9999}]
    bad += [
        {"content": b'{"prompt": "\\ud800"}'},
        {"content": b'{"prompt": "a \\ud83d dog"}'},
        {"content": b'{"prompt": 1' + b"0" * 5000 + b"}"},
    ]
    for options in bad:
        response = ask(**options)
        assert response.status_code == 422 and len(response.text) < 600, (options, response.text)


def test_only_forms_with_images_may_be_large(api, settings):
    """A JSON body is refused beyond the size of the longest prompt, because it is parsed on the event loop."""
    ask = lambda text: call(
        api, "POST", "/v1/prompt_length", content=text, headers={"content-type": "application/json"}
    )
    assert ask(json.dumps({"prompt": "\U0001f600" * settings.max_prompt_chars})).status_code == 200
    response = ask(json.dumps({"prompt": "a", "x": [[]] * 10_000}))
    assert response.status_code == 413 and "25024 bytes" in response.json()["error"]["message"], response.text


@pytest.mark.parametrize(("size", "output_format"), [("64x16384", "webp"), ("65504x64", "jpeg")])
def test_sizes_that_a_format_cannot_store_are_422(replica, settings, size, output_format):
    api = create_api(Large(replica), settings)
    response = edit(api, size=size, output_format=output_format, num_inference_steps="1")
    assert response.status_code == 422 and "px per side" in response.json()["error"]["message"], response.text


class Large:
    """A model that accepts large images."""

    def __init__(self, replica):
        self._replica = replica

    async def model(self):
        info = await self._replica.model()
        return replace(info, limits=info.limits.model_copy(update={"max_pixels": 2**23}))


def test_a_bug_ends_a_stream_with_an_error_event(api, monkeypatch, caplog):
    """An unexpected exception after the start of a stream is its last event, and is logged."""

    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(serving.http.streaming, "image_data", broken)
    event = events_of(edit(api, stream="true"))[-1]
    assert event["type"] == "error" and event["error"]["code"] == "server_error" and "a bug" not in str(event)
    assert "unexpected error" in caplog.text


def test_models_health_and_description(api, settings):
    model = call(api, "GET", "/v1/models").json()["data"][0]
    assert model["id"] == "tiny" and model["preset"] == "paper" and model["vocabulary"]["subjects"] == ["dog"]
    assert model["sampling"]["num_inference_steps"] == 4 and model["limits"]["max_images"] == 3
    assert call(api, "GET", "/healthz").json() == {"status": "ok"}
    schema = call(api, "GET", "/openapi.json").json()
    body = schema["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    assert list(body) == ["multipart/form-data"] and "Error" in schema["components"]["schemas"]


def test_api_key_is_required(replica, settings):
    locked = create_api(replica, settings.model_copy(update={"api_key": Settings(api_key="secret").api_key}))
    for headers, status in (
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer secret"}, 200),
    ):
        assert call(locked, "GET", "/v1/models", headers=headers).status_code == status
    assert call(locked, "POST", "/v1/images/edits", content=b"x").status_code == 401
    assert call(locked, "GET", "/healthz").status_code == 200 and call(locked, "GET", "/v1/nothing").status_code == 401


@pytest.mark.parametrize("key", [b"", b"Bearer", b"Bearer wrong", b"Basic secret", "Bearer sécret".encode()])
def test_a_wrong_api_key_is_rejected_before_the_body_is_read(replica, settings, key):
    """A missing or wrong key is answered before any byte of the body has arrived."""
    locked = create_api(replica, settings.model_copy(update={"api_key": Settings(api_key="secret").api_key}))
    headers = [(b"content-type", b"multipart/form-data; boundary=x"), (b"content-length", b"100000000")]
    scope = {"type": "http", "method": "POST", "path": "/v1/images/edits", "root_path": "", "query_string": b""}
    scope["headers"] = [*headers, (b"authorization", key)]
    sent = []

    async def receive():
        raise AssertionError("the body was read")

    async def send(message):
        sent.append(message)

    asyncio.run(locked(scope, receive, send))
    assert sent[0]["status"] == 401 and json.loads(sent[1]["body"])["error"]["code"] == "invalid_api_key"


def test_full_queue_is_429_with_retry_after(replica, settings, decoded):
    """A full queue is status 429 with the delay that the backend requests, streaming or not; no image is decoded."""

    class Full:
        async def model(self):
            return await replica.model()

        def reserve(self, number, client):
            raise QueueFull("8 images are waiting already.", 7)

    api = create_api(Full(), settings)
    for stream in ("false", "true"):
        response = edit(api, [DOG], target_phrase="dog", stream=stream)
        assert not decoded and response.status_code == 429 and response.headers["retry-after"] == "7"
        assert response.json()["error"]["code"] == "overloaded"


@pytest.mark.parametrize(
    "server,host,hosts,trusted",
    [
        ("127.0.0.1", "localhost:8000", None, True),
        ("127.0.0.1", "127.0.0.1:8000", None, True),
        ("::1", "[::1]:8000", None, True),
        ("127.0.0.1", "192.168.0.7", None, True),
        ("127.0.0.1", "LocalHost", None, True),
        ("127.0.0.1", "rebound.example.com:8000", None, False),
        ("::ffff:127.0.0.1", "rebound.example.com", None, False),
        ("127.0.0.1", "localhost.example.com", None, False),
        ("127.0.0.1", "", None, False),
        ("10.0.0.5", "service.example.com", None, True),
        ("10.0.0.5", "other.example.com", ["service.example.com"], False),
        ("10.0.0.5", "Service.example.com:443", ["service.example.com"], True),
        ("127.0.0.1", "a.example.com", ["*.example.com"], True),
        ("127.0.0.1", "example.com", ["*.example.com"], False),
        ("127.0.0.1", "anything", ["*"], True),
    ],
)
def test_trusted_hosts(replica, settings, server, host, hosts, trusted):
    """A name that could be rebound to this machine is rejected; `trusted_hosts` replaces the default rule."""
    api = create_api(replica, settings.model_copy(update={"trusted_hosts": hosts}))
    url = f"http://[{server}]" if ":" in server else f"http://{server}"
    response = call(api, "GET", url + "/v1/models", headers={"Host": host})
    assert response.status_code == (200 if trusted else 403), response.text
    assert trusted or ("trusted_hosts" in response.text and response.json()["error"]["code"] == "untrusted_host")


def test_http_client_matches_the_interface(api, replica):
    """Model, image and stream of HttpClient equal those of the replica; errors keep their type."""
    client = HttpClient("http://test", max_retries=0, transport=httpx.ASGITransport(api))
    request = Request(
        prompt=PROMPT,
        subjects=(
            Subject(image=subject_image(), target_phrase="dog", scope_ratio=0.3),
            Subject(image=subject_image("blue"), target_phrase="cat"),
        ),
        early_stop_step=1.0,
        mask_source="generation_branch",
        mask_interval=2,
        width=96,
        seed=2**62,
    )

    async def run():
        assert (await client.model()) == (await replica.model())
        assert (await client.prompt_length(LONG_PROMPT)) == (await replica.prompt_length(LONG_PROMPT))
        assert (await client.generate(Request(prompt=LONG_PROMPT, seed=0))).warnings[0].startswith("prompt has 27 ")
        direct, over_http = await replica.generate(request), await client.generate(request)
        assert direct.image.tobytes() == over_http.image.tobytes() and direct.seed == over_http.seed == 2**62
        assert [m.tobytes() for m in direct.masks] == [m.tobytes() for m in over_http.masks]
        events = [event async for event in client.stream(request)]
        assert events[-1].image.tobytes() == direct.image.tobytes() and len(events) >= 6
        with pytest.raises(ValueError, match="65"):
            await client.generate(Request(prompt="a dog", height=65))

    asyncio.run(run())
