"""1,000 generated requests against the HTTP interface: no server error, no lost time, no lasting damage.

Each request is a valid one with one to three random changes. The random numbers are seeded; a failure names the number
of the request.
"""

import asyncio
import io
import json
import random
import struct
import time
import zlib

import httpx
import pytest
from PIL import Image
from tiny import subject_image, tiny_pipeline

from serving.http.app import create_api
from serving.replica import Replica
from serving.settings import Settings

NUM_REQUESTS = 1000
CONCURRENCY = 8
TIMEOUT_S = 30.0  # deadline of every image; a request gets twice as long
BOUNDARY = b"boundary"


@pytest.fixture(scope="module")
def replica(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    limits = dict(max_steps=4, max_images=2, max_subjects=3, max_pixels=96 * 96, max_timeout_s=TIMEOUT_S)
    sizes = dict(max_image_bytes=100_000, max_reference_pixels=4_000_000, max_reference_pixels_total=6_000_000)
    settings = Settings(model=str(folder), device="cpu", cpu_threads=1, **limits, **sizes)
    replica = Replica(settings)
    yield replica, create_api(replica, settings)
    replica.close()


def png(size=(32, 32), mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def file_of(kind: str) -> bytes:
    buffer = io.BytesIO()
    subject_image().save(buffer, kind)
    return buffer.getvalue()


def declared(width: int, height: int) -> bytes:
    """A PNG that declares a size and contains no pixels."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


GOOD = [file_of(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
BAD = [b"", b"text", GOOD[0][:80], GOOD[1][:200], GOOD[2][:60], b"\x00" * 1000, b"GIF89a" + b"\xff" * 50]
BAD += [declared(60_000, 60_000), declared(0, 5), declared(2**31 - 1, 1), png((1, 1)), png((2000, 2000), "L")]
BAD += [png((1500, 1500), "1"), b"<svg/>", b"x" * 150_000, GOOD[0] + b"trailing"]
NUMBERS = [
    0,
    -1,
    1,
    3,
    0.5,
    1e308,
    -1e308,
    1e-320,
    10**400,
    2**63,
    2**64,
    "nan",
    "inf",
    "-inf",
    "1e999",
    "0x10",
    "1_000",
]
NUMBERS += ["١", "½", "3.0", "", " ", "true", "9" * 5000]
TEXTS = [
    "",
    " ",
    "\x00",
    "dog",
    "a dog",
    "DOG\u0301",
    "狗",
    "🐕" * 50,
    "a" * 5000,
    "\u202e dog",
    "dog'",
    "\ud7ff",
    "dog\r\n",
]
TEXTS += ["{", "[]", "null", "a dog " * 400, "\\", "%s%n", "${x}", "\ufeffdog", "d\u200bog", "<script>"]
JSONS = ["[", "{}", "[[]]", "[{}]", "null", '"dog"', "[" * 5000, '[{"target_phrase": "dog", "image": 1e999}]']
JSONS += [
    json.dumps([{"target_phrase": t, "image": n}]) for t in ("dog", "", 5, None) for n in (0, -1, 2**70, "0", None)
]
JSONS += [json.dumps([{"target_phrase": "dog", "scope_ratio": s}]) for s in (0, 1e308, -1, "1", [], {})]
JSONS += [json.dumps([{"target_phrase": "dog", "unknown": 1}]), '[{"target_phrase": "\\ud800"}]', "1" * 5000]
NUMERIC = ("n", "num_inference_steps", "early_stop_step", "guidance_scale", "mask_interval", "seed", "partial_images")
NUMERIC += ("timeout_s", "scope_ratio")
TEXTUAL = ("prompt", "negative_prompt", "target_phrase", "size", "mask_source", "model", "output_format", "user")
TEXTUAL += ("quality", "response_format", "stream", "previews", "progress", "background", "unknown", "target_phrase[]")

Part = tuple[str, str | None, bytes]  # name, file name, content


def valid(rng: random.Random) -> list[Part]:
    parts: list[Part] = [
        ("prompt", None, b"a dog and a cat"),
        ("num_inference_steps", None, b"2"),
        ("seed", None, b"1"),
    ]
    if rng.random() < 0.7:
        parts += [("image", "dog.png", rng.choice(GOOD)), ("target_phrase", None, b"dog")]
    if rng.random() < 0.3:
        parts.append(("stream", None, b"true"))
    return parts


def changed(parts: list[Part], rng: random.Random) -> list[Part]:
    """One change of one field."""
    parts, index = list(parts), rng.randrange(len(parts) + 1)
    name, file, content = parts[min(index, len(parts) - 1)]
    change = rng.randrange(9)
    if change == 0 and len(parts) > 1:
        parts.remove((name, file, content))
    elif change == 1:
        parts.insert(index, (name, file, content))
    elif change == 2:
        parts.append((rng.choice(NUMERIC), None, _text(rng.choice(NUMBERS))))
    elif change == 3:
        parts.append((rng.choice(TEXTUAL), None, _text(rng.choice(TEXTS))))
    elif change == 4:
        parts.append((rng.choice(("image", "image[]")), rng.choice(("x.png", "", None, "é" * 300)), rng.choice(BAD)))
    elif change == 5:
        parts = [part for part in parts if part[0] != "target_phrase"] + [
            ("subjects", None, rng.choice(JSONS).encode())
        ]
    elif change == 6:
        parts = [(n, f, _text(rng.choice(TEXTS)) if n == name else c) for n, f, c in parts]
    elif change == 7:
        parts.append((name, None if file else "file.txt", content))  # a file as text, or text as a file
    else:
        damaged = bytearray(content or b"x")
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        parts[parts.index((name, file, content))] = (name, file, bytes(damaged))
    return parts


def _text(value) -> bytes:
    return str(value).encode("utf-8", "surrogatepass") if not isinstance(value, int) else b"%d" % value


def multipart(parts: list[Part]) -> bytes:
    body = b""
    for name, file, content in parts:
        head = f'Content-Disposition: form-data; name="{name}"' + ("" if file is None else f'; filename="{file}"')
        body += b"--%s\r\n%s\r\n\r\n%s\r\n" % (BOUNDARY, head.encode(), content)
    return body + b"--%s--\r\n" % BOUNDARY


def generated(number: int) -> dict:
    """Options of the n-th request for `httpx`."""
    rng = random.Random(number)
    parts = valid(rng)
    for _ in range(rng.randint(1, 3)):
        parts = changed(parts, rng)
    body = multipart(parts)
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY.decode()}"}
    odd = rng.randrange(20)
    if odd == 0:
        body = body[: rng.randrange(len(body))]
    elif odd == 1:
        kinds = (
            "application/json",
            "text/plain",
            "multipart/form-data",
            "application/x-www-form-urlencoded",
            "x" * 5000,
        )
        headers["Content-Type"] = rng.choice(kinds)
    elif odd == 2:
        del headers["Content-Type"]
    elif odd == 3:
        headers |= {"Accept": "\x7f", "X-Forwarded-For": "1" * 3000, "Content-Length": rng.choice(("-1", "1e9", "0"))}
    elif odd == 4:
        body = rng.choice(JSONS).encode()
        return {
            "method": "POST",
            "url": "/v1/prompt_length",
            "content": body,
            "headers": {"Content-Type": "application/json"},
        }
    elif odd == 5:
        prompt = rng.choice(TEXTS + NUMBERS[:9])
        return {"method": "POST", "url": "/v1/prompt_length", "json": {"prompt": prompt}}
    return {"method": "POST", "url": "/v1/images/edits", "content": body, "headers": headers}


def test_generated_requests(replica):
    """No response is a server error, none comes after its deadline, and afterwards the interface still generates."""
    replica, api = replica
    statuses: dict[int, int] = {}

    async def ask(http: httpx.AsyncClient, number: int) -> None:
        start = time.monotonic()
        response = await asyncio.wait_for(http.request(**generated(number)), 2 * TIMEOUT_S)
        seconds = time.monotonic() - start
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        # 504: a generated timeout_s close to 0
        assert response.status_code < 500 or response.status_code == 504, (number, response.status_code, response.text)
        assert seconds < TIMEOUT_S + 2, (number, seconds)
        if response.status_code != 200:
            assert len(response.content) < 2000, (number, response.text[:300])
            assert response.json()["error"]["message"], number
        elif "error" in (text := response.text) and "event: error" in text:
            error = json.loads(text.split("event: error\ndata: ")[1].split("\n")[0])["error"]
            assert error["type"] != "server_error" or error["code"] == "timeout", (number, error)

    async def run():
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            numbers = iter(range(NUM_REQUESTS))

            async def work():
                for number in numbers:
                    await ask(http, number)

            await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
            last = await http.post("/v1/images/edits", data={"prompt": "a dog", "num_inference_steps": "2"})
            assert last.status_code == 200 and last.json()["data"], last.text
        replica.check_health()
        stats = await replica.stats()
        assert not any(stats[state] for state in ("waiting", "preparing", "active")), stats

    asyncio.run(run())
    assert statuses[200] > NUM_REQUESTS / 10 and statuses[422] > NUM_REQUESTS / 4, statuses
