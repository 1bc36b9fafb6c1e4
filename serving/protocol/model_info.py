"""ModelInfo: description of the loaded model for clients."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from realcustom.config import SamplingDefaults

from .limits import Limits


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The loaded model.

    Attributes:
        id: name of the model.
        preset: variant of the method: "paper", "release" or "custom".
        sampling: defaults of the settings that a request leaves unset.
        limits: upper bounds on one request.
        max_tokens: tokens of a prompt that the text encoder reads, including the start and end tokens.
        vocabulary: words that the model was trained on, by category; empty if it is not restricted to them.
    """

    id: str
    preset: str
    sampling: SamplingDefaults
    limits: Limits
    max_tokens: int = 77  # of CLIP
    vocabulary: dict[str, list[str]] = field(default_factory=dict)

    def with_limits(self, limits: Limits) -> "ModelInfo":
        return replace(self, limits=limits)

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "preset": self.preset,
            "sampling": asdict(self.sampling),
            "limits": self.limits.model_dump(),
            "max_tokens": self.max_tokens,
            "vocabulary": self.vocabulary,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelInfo":
        return cls(
            id=values["id"],
            preset=values["preset"],
            sampling=SamplingDefaults(**values["sampling"]),
            limits=Limits(**values["limits"]),
            max_tokens=values["max_tokens"],
            vocabulary=values["vocabulary"],
        )
