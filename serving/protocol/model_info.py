"""What a client needs to know about the loaded model."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from realcustom.config import SamplingDefaults

from .limits import Limits


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The loaded model.

    Attributes:
        id: its name.
        preset: "paper", "release" or "custom": how the method is computed.
        sampling: what a request that says nothing is sampled with.
        limits: what one request may ask for.
        vocabulary: words the model knows, by kind; empty for a model that knows them all.
    """

    id: str
    preset: str
    sampling: SamplingDefaults
    limits: Limits
    vocabulary: dict[str, list[str]] = field(default_factory=dict)

    def with_limits(self, limits: Limits) -> "ModelInfo":
        return replace(self, limits=limits)

    def to_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "preset": self.preset,
            "sampling": asdict(self.sampling),
            "limits": self.limits.model_dump(),
            "vocabulary": self.vocabulary,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelInfo":
        return cls(
            id=values["id"],
            preset=values["preset"],
            sampling=SamplingDefaults(**values["sampling"]),
            limits=Limits(**values["limits"]),
            vocabulary=values["vocabulary"],
        )
