"""Uploaded reference images. Gradio's own decoding raises before an event handler runs, so the page does without it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder

from serving.clients import INPUT_FORMATS, InvalidRequest, Limits, ReferenceImage, decode_image

FILE_ROUTE = "/gradio_api/file="
_ISO_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "HEIC"
)


def read_upload(upload: Any, limits: Limits) -> ReferenceImage:
    """Decode an uploaded file. Takes up to seconds for a large photograph: call it in a thread.

    Args:
        upload: value of a `gr.Image` without preprocessing, a dictionary with the `path` of the file on this machine
            and its `orig_name`. API users may send anything.
    Raises:
        InvalidRequest: the file was not uploaded, or is empty, damaged, too large, or not an image in one of
            `INPUT_FORMATS`; the message names the file.
    """
    if not isinstance(upload, Mapping) or not isinstance(upload.get("path"), str) or not upload["path"]:
        raise InvalidRequest("The image has no file; upload one.")
    name = str(upload.get("orig_name") or "The image")
    # Clients of the Model Context Protocol send the address of a file that they uploaded. Gradio does not check the
    # path of an API user who omits the field `meta`.
    location = upload["path"].replace("\0", "")  # which no path may contain
    path = Path(location.partition(FILE_ROUTE)[2] or location).resolve()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()):
        raise InvalidRequest("The image was not uploaded to this page; upload it first.")
    if not os.path.isfile(path):
        raise InvalidRequest(f"{name} is not on the server, which keeps files for an hour; upload it again.")
    with open(path, "rb") as file:
        header = file.read(12)
        unsupported = _ISO_BRANDS.get(header[8:]) if header[4:8] == b"ftyp" else None
        if unsupported and unsupported not in INPUT_FORMATS:
            raise InvalidRequest(f"{name} is in the format {unsupported}; upload {', '.join(INPUT_FORMATS)}.")
        return decode_image(file, limits, name)
