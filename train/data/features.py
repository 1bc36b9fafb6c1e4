"""Precomputed features of the frozen models in safetensors files.

A feature is found by a key: a hash of the content, the encoder's revision, the size and the crop. A changed image, crop
or encoder thus has another key, and stale features are never used. `precompute` writes the files. Each tensor has a
checksum in the metadata of its file; a damaged feature is computed again.
"""

import json
import logging
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from realcustom.pipeline import RealCustomPipeline

from .kinds import KINDS, NAMES, Kind
from .sample import Sample
from .sidecar import write_atomically

log = logging.getLogger(__name__)

MAX_OPEN_FILES = 64


class FeatureStore:
    """The features in a folder; calling it with a sample returns those of the sample by name, or None.

    Args:
        folder: created by `precompute`.
        revisions: revision of the encoder of each kind, see `encoder_revisions`.
    """

    def __init__(self, folder: Path, revisions: Mapping[Kind, str]) -> None:
        self.folder, self._revisions = folder, dict(revisions)
        self._files: dict[str, Path] = {}  # tensor name -> file
        self._checksums: dict[str, str] = {}  # tensor name -> CRC-32
        self._open: OrderedDict[Path, safe_open] = OrderedDict()
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    self._checksums.update(file.metadata() or {})
                    self._files.update((name, path) for name in file.keys() if name in self._checksums)
            except (SafetensorError, OSError) as error:
                log.warning("%s is damaged (%s); its features are computed again.", path, error)

    def __len__(self) -> int:
        return len(self._files)

    def __call__(self, sample: Sample) -> dict[str, Tensor] | None:
        """The features of a sample that are stored, by name."""
        found = {}
        for kind in KINDS:
            if (key := self.key(kind, sample)) is not None:
                stored = [(name, path) for name in NAMES[kind] if (path := self._files.get(f"{key}.{name}"))]
                values = {name: self._read(path, f"{key}.{name}") for name, path in stored}
                found |= {name: value for name, value in values.items() if value is not None}
        return found or None

    def key(self, kind: Kind, sample: Sample) -> str | None:
        """The key of one kind of features, or None if the content of the sample is unknown."""
        if kind == "text":
            parts = (sample.caption,)
        elif sample.content is None:
            return None
        elif kind == "latents":
            parts = (sample.content[0], sample.image.shape, sample.original_size, sample.crop, sample.flipped)
        else:
            parts = (sample.content[1], sample.reference.shape, sample.reference_box, sample.flipped)
        return blake2b(repr((kind, self._revisions[kind], *parts)).encode(), digest_size=16).hexdigest()

    def revision(self, kind: Kind) -> str:
        """Revision of the encoder of a kind."""
        return self._revisions[kind]

    def contains(self, kind: Kind, key: str) -> bool:
        """Whether the features of a key are stored."""
        return f"{key}.{NAMES[kind][0]}" in self._files

    def write(self, tensors: Mapping[str, Tensor]) -> Path:
        """Store tensors "key.name" in a new file; it appears only when it is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = blake2b("\n".join(sorted(tensors)).encode(), digest_size=8).hexdigest()
        path = self.folder / f"{name}.safetensors"
        values = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        checksums = {name: _checksum(value) for name, value in values.items()}
        write_atomically(path, save(values, checksums))
        self._files.update(dict.fromkeys(values, path))
        self._checksums |= checksums
        return path

    def _read(self, path: Path, name: str) -> Tensor | None:
        """A stored tensor; None if it is damaged, which is logged once."""
        if path not in self._open:
            self._open[path] = safe_open(path, "pt")
            if len(self._open) > MAX_OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        value = self._open[path].get_tensor(name)
        if _checksum(value) == self._checksums[name]:
            return value
        log.warning("%s in %s is damaged; it is computed again.", name, path)
        del self._files[name]
        return None


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data):08x}"


def open_features(folder: Path | None, pipeline: RealCustomPipeline) -> Callable[[Sample], dict[str, Tensor] | None]:
    """The features that a run looks up; without a folder, none are found.

    Raises:
        ValueError: the folder has no features.
    """
    if folder is None:
        return lambda sample: None
    store = FeatureStore(folder, encoder_revisions(pipeline))
    if not len(store):
        raise ValueError(
            f"{folder} contains no precomputed features; create them with `python -m train.data precompute`, or train "
            "with data.features=none."
        )
    return store


def encoder_revisions(pipeline: RealCustomPipeline) -> dict[Kind, str]:
    """Revision of the encoder of each kind of features: a hash of its weights, type and settings."""
    text, vision = pipeline.text_encoders, pipeline.vision_encoders
    assert vision is not None
    tokenizers = [_vocabulary(tokenizer) for tokenizer, _ in text.pairs]
    text_models, vision_models = [encoder for _, encoder in text.pairs], [vision.siglip, vision.dino]
    views = (vision.vision, vision.method.reference_resize, vision.method.local_views)
    return {
        # The trainer runs the autoencoder in float32, whatever the type of its weights.
        "latents": _revision([pipeline.vae], _settings(pipeline.vae)),
        "text": _revision(text_models, (tokenizers, text.pooled_projection, _types(text_models))),
        "vision": _revision(vision_models, (views, _types(vision_models))),
    }


def _vocabulary(tokenizer) -> str:
    """The tokenizer without the settings that it remembers from its last call."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({name: value for name, value in content.items() if name not in ("padding", "truncation")})


def _types(modules: Sequence[nn.Module]) -> list[str]:
    return [str(next(module.parameters()).dtype) for module in modules]


def _settings(model) -> list[tuple[str, object]]:
    """The configuration without the names of folders and versions."""
    return sorted((name, value) for name, value in model.config.items() if not name.startswith("_"))


def _revision(modules: Iterable[nn.Module], settings: object) -> str:
    digest = blake2b(repr(settings).encode(), digest_size=16)
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()
