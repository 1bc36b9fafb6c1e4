"""Presets and defaults: how the method is computed, how images are sampled, which vision features are used."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

PresetName = Literal["paper", "release"]
ModelFamily = Literal["sdxl", "sd15"]
MemoryTier = Literal["high", "medium", "low"]
Execution = Literal["auto", "eager", "graphs"]
MaskSource = Literal["guidance_branch", "generation_branch"]

SIGLIP = "google/siglip-so400m-patch14-384"  # hub ids of the vision encoders (Sec. 4.1)
DINOV2 = "facebook/dinov2-with-registers-large"


def _check_choice(owner: object, **choices: tuple[str, ...]) -> None:
    for name, allowed in choices.items():
        value = getattr(owner, name)
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Details of the method in which the authors' released code differs from the paper. The defaults follow the paper.

    `mask_normalization`, `mask_selection` and `mask_binary` have the same value in both presets and are options of the
    release.

    Attributes:
        mask_maps: "self_times_cross" multiplies the low-resolution cross-attention of the target words with the
            high-resolution self-attention (Eq. 14); "all_cross" averages the cross-attention of every layer.
        mask_normalization: how relevance is scaled before the top-K selection. "max" divides by the maximum, which
            commutes with the selection and so equals Eq. 15; "min_max" maps to [0, 1]; "min_max_per_layer" does so in
            every layer before averaging and once more after; "none" keeps the raw mean.
        mask_selection: "top_k" keeps floor(scope * positions) positions; "threshold" keeps values >= 1 - scope.
        mask_binary: kept positions become 1 instead of keeping their relevance.
        mask_resize: how masks are resized to smaller attention resolutions, "per_axis" or by the "height_factor" on
            both axes, which differs where the height is not a multiple of 32 px.
        disjoint_masks: the positions of several subjects do not overlap (Alg. 1); otherwise each subject selects its
            positions independently.
        local_views: the four local views of Eq. 7 are the "quadrants" of the enlarged image, or its "interleaved"
            subsamplings.
        reference_resize: "antialias" resizes references with antialiasing in floating point; "bilinear_uint8"
            follows the release (bilinear without antialiasing, truncated to 8 bits before the encoder).
        pooled_projection: the pooled text embedding passes through the text projection, as in stock SDXL.
        time_ids: order of the size condition, "height_first" as in stock SDXL or "width_first".
        unconditional_vision: the reference of the unconditional row of Eq. 17: "none", or a "black_image" inside the
            same masks.
        final_latents: what is decoded: the "sample" after the last step, as in diffusers, or the last
            "clean_estimate", as in the release.
    """

    mask_maps: Literal["self_times_cross", "all_cross"] = "self_times_cross"
    mask_normalization: Literal["max", "min_max", "min_max_per_layer", "none"] = "max"
    mask_selection: Literal["top_k", "threshold"] = "top_k"
    mask_binary: bool = False
    mask_resize: Literal["per_axis", "height_factor"] = "per_axis"
    disjoint_masks: bool = True
    local_views: Literal["quadrants", "interleaved"] = "quadrants"
    reference_resize: Literal["antialias", "bilinear_uint8"] = "antialias"
    pooled_projection: bool = True
    time_ids: Literal["height_first", "width_first"] = "height_first"
    unconditional_vision: Literal["none", "black_image"] = "none"
    final_latents: Literal["sample", "clean_estimate"] = "sample"

    def __post_init__(self) -> None:
        _check_choice(
            self,
            mask_maps=("self_times_cross", "all_cross"),
            mask_normalization=("max", "min_max", "min_max_per_layer", "none"),
            mask_selection=("top_k", "threshold"),
            mask_resize=("per_axis", "height_factor"),
            local_views=("quadrants", "interleaved"),
            reference_resize=("antialias", "bilinear_uint8"),
            time_ids=("height_first", "width_first"),
            unconditional_vision=("none", "black_image"),
            final_latents=("sample", "clean_estimate"),
        )

    @classmethod
    def preset(cls, name: PresetName) -> "MethodConfig":
        """The method as described in the paper, or as computed by the authors' released code.

        Raises:
            ValueError: an unknown preset.
        """
        if name == "paper":
            return cls()
        if name == "release":
            return cls(
                mask_maps="all_cross",
                mask_resize="height_factor",
                disjoint_masks=False,
                local_views="interleaved",
                reference_resize="bilinear_uint8",
                pooled_projection=False,
                time_ids="width_first",
                unconditional_vision="black_image",
                final_latents="clean_estimate",
            )
        raise ValueError(f"preset {name!r} does not exist; use 'paper' or 'release'.")


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """Defaults of the settings that a request leaves unset. The values are the paper's for SDXL (Sec. 4.1).

    Attributes:
        height, width: pixels of the image.
        num_inference_steps: denoising steps.
        early_stop_step: T_stop, the number of steps that compute a mask; later steps reuse the last one.
        guidance_scale: ω of Eq. 17; 1 runs no unconditional row.
        scope_ratio: γ_scope, fraction of positions a subject may influence, in (0, 1].
        mask_source, mask_interval: how masks are computed, see `Request`.
    """

    height: int = 1024
    width: int = 1024
    num_inference_steps: int = 25
    early_stop_step: int = 12
    guidance_scale: float = 7.5
    scope_ratio: float = 0.2
    mask_source: MaskSource = "guidance_branch"
    mask_interval: int = 1


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Blocks of the two vision encoders whose outputs are used (Sec. 4.1). Block indices start at 0.

    Attributes:
        siglip_shallow, dino_shallow: blocks whose outputs are the shallow features, pairwise concatenated.
        siglip_deep, dino_deep: blocks whose outputs are the deep features. The paper names the last
            block; both presets use the second to last, as the release does.
    """

    siglip_shallow: tuple[int, ...] = (7, 13, 19)
    siglip_deep: int = 25
    dino_shallow: tuple[int, ...] = (4, 10, 16)
    dino_deep: int = 22

    def __post_init__(self) -> None:
        object.__setattr__(self, "siglip_shallow", tuple(self.siglip_shallow))
        object.__setattr__(self, "dino_shallow", tuple(self.dino_shallow))
        if len(self.siglip_shallow) != len(self.dino_shallow):
            raise ValueError(
                f"siglip_shallow has {len(self.siglip_shallow)} layers and dino_shallow {len(self.dino_shallow)}; "
                "they are concatenated pairwise, so give both the same number."
            )


@dataclass(frozen=True, kw_only=True)
class RealCustomConfig:
    """The RealCustom++ part of a model's configuration, stored in its `model_index.json`."""

    method: MethodConfig = field(default_factory=MethodConfig)
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    vision: VisionConfig = field(default_factory=VisionConfig)

    @classmethod
    def preset(cls, name: PresetName, family: ModelFamily = "sdxl") -> "RealCustomConfig":
        """The paper's settings for a model family (Sec. 4.1), or the initial settings of the authors' demo.

        Raises:
            ValueError: an unknown preset or family, or "release" for SD1.5, for which the authors released no weights.
        """
        method = MethodConfig.preset(name)
        if family == "sdxl":
            release = SamplingDefaults(guidance_scale=3.5, scope_ratio=0.25)
            return cls(method=method, sampling=release if name == "release" else SamplingDefaults())
        if family == "sd15":
            if name == "release":
                raise ValueError("preset 'release' is for SDXL; the authors did not release SD1.5 weights.")
            sampling = SamplingDefaults(
                height=512, width=512, num_inference_steps=50, early_stop_step=25, guidance_scale=12.5
            )
            return cls(method=method, sampling=sampling)
        raise ValueError(f"family {family!r} does not exist; use 'sdxl' or 'sd15'.")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as nested dictionaries, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RealCustomConfig":
        """Inverse of `to_dict`.

        Raises:
            ValueError: an unknown field or an invalid value.
        """
        parts = {"method": MethodConfig, "sampling": SamplingDefaults, "vision": VisionConfig}
        _check_names("realcustom_config", values, parts)
        for name, part in parts.items():
            _check_names(name, values.get(name, {}), {f.name for f in fields(part)})
        return cls(**{name: part(**values.get(name, {})) for name, part in parts.items()})


def _check_names(owner: str, values: dict[str, Any], known) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{owner} has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}.")
