"""Preset `release` reproduces stored numbers of the authors' code.

The environment variable REALCUSTOM_GOLDEN selects another folder than `tests/golden`: any set of the same layout, with
its own batch size, image sizes, weights and tolerances.
"""

import json
import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from realcustom import MethodConfig, RealCustomAdapter, RealCustomConfig, RealCustomPipeline, Request, Subject
from realcustom.config import VisionConfig
from realcustom.convert import convert_official, convert_timm_vit
from realcustom.keys_values import PackedKeysValues
from realcustom.mask import aggregate_attention_maps, guidance_masks
from realcustom.recorder import AttentionRecorder
from realcustom.scheduler import AlternatingDPMSolverScheduler
from realcustom.unet_call import stack_columns
from realcustom.vision import VisionFeatures, reference_views, to_pixels
from realcustom.words import find_phrase, target_token_positions

FOLDER = Path(os.environ.get("REALCUSTOM_GOLDEN", Path(__file__).parent / "golden"))
TOLERANCE_FACTOR = 5  # times the difference between the stored fp32 numbers and float64


class GoldenSet:
    """The stored numbers and a pipeline built from the stored weights."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.meta = json.loads((folder / "meta.json").read_text())
        self.inputs = self.load("inputs")
        self.outputs = self.load("outputs")
        self.vision = self.load("vision")
        self.loops = self.load("loops")
        self.crossmaps = self.load("crossmaps")

    def load(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"{name}.safetensors", device=self.device)

    @property
    def batch(self) -> int:
        return len(self.inputs["latent"])

    def tolerance(self, name: str) -> float:
        """Largest accepted absolute difference of an output, from the set's own `differences_to_float64`."""
        return TOLERANCE_FACTOR * self.meta["differences_to_float64"][name]

    def image_of(self, reference: str) -> Image.Image:
        """The source image of "ref1" or "ref2", or the black image of "neg"."""
        if reference == "neg":
            return Image.new("RGB", (8, 8))
        index = {"ref1": 0, "ref2": self.meta["ref2_image_index"]}[reference]
        return Image.fromarray(self.vision[f"image_{index}_uint8_hwc"].cpu().numpy())

    @cached_property
    def official_state(self):
        return self.load("unet_weights")

    @cached_property
    def encoders(self):
        config = json.loads((self.folder / "vision_config.json").read_text())
        state = self.load("vision_weights")
        width = config["embed_dim"]
        common = dict(
            hidden_size=width,
            num_hidden_layers=config["depth"],
            num_attention_heads=config["num_heads"],
            image_size=config["default_image_size"],
            patch_size=config["patch_size"],
            hidden_act="gelu",
            layer_norm_eps=config["siglip"]["norm_eps"],
        )
        siglip = SiglipVisionModel(
            SiglipVisionConfig(intermediate_size=int(width * config["mlp_ratio"]), vision_use_head=False, **common)
        )
        dino = Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(
                mlp_ratio=int(config["mlp_ratio"]), num_register_tokens=config["dino"]["reg_tokens"], **common
            )
        )
        for model, prefix, family in ((siglip, "siglip.", "siglip"), (dino, "dino.", "dinov2_with_registers")):
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            model.load_state_dict(convert_timm_vit(own, family), strict=True)
        shallow = tuple(config["feature_index_shallow"][:-1])
        (deep,) = config["feature_index_highres"]
        layers = VisionConfig(siglip_shallow=shallow, siglip_deep=deep, dino_shallow=shallow, dino_deep=deep)
        return siglip.to(self.device).eval(), dino.to(self.device).eval(), layers

    def adapter(self, shallow: bool = False) -> RealCustomAdapter:
        state = dict(self.official_state)
        if shallow:
            state |= self.load("projector_shallow_extra_weights")
        own, _ = convert_official(state)
        siglip, dino, _ = self.encoders
        adapter = RealCustomAdapter.for_unet(
            self.unet,
            vision_dim=siglip.config.hidden_size + dino.config.hidden_size,
            cross_layer=shallow,
            cross_scale=not shallow,
        )
        adapter.load_state_dict(own, strict=True)
        return adapter.to(self.device).requires_grad_(False).eval()

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        config = json.loads((self.folder / "unet_config.json").read_text())
        config.pop("image_prompt_settings")
        unet = UNet2DConditionModel.from_config(config)
        _, plain = convert_official(self.official_state)
        unet.load_state_dict(plain, strict=True)
        return unet.to(self.device).requires_grad_(False).eval()

    @cached_property
    def pipeline(self) -> RealCustomPipeline:
        siglip, dino, layers = self.encoders
        texts = [self.folder / f"text_encoder_{i}" for i in (1, 2)]
        config = RealCustomConfig.preset("release")
        sampling = replace(config.sampling, height=self.meta["height"], width=self.meta["width"])
        return RealCustomPipeline(
            vae=AutoencoderKL(
                block_out_channels=(4,) * 4,
                norm_num_groups=2,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                latent_channels=4,
            ),
            text_encoder=CLIPTextModel.from_pretrained(texts[0]),
            tokenizer=CLIPTokenizer.from_pretrained(texts[0]),
            text_encoder_2=CLIPTextModel.from_pretrained(texts[1]),
            tokenizer_2=CLIPTokenizer.from_pretrained(texts[1]),
            unet=self.unet,
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                timestep_spacing="trailing",
                clip_sample=False,
                set_alpha_to_one=True,
            ),
            image_encoder=siglip,
            image_encoder_2=dino,
            adapter=self.adapter(),
            realcustom_config=replace(config, vision=layers, sampling=sampling),
            force_zeros_for_empty_prompt=False,
        ).to(self.device)

    def features(self, reference: str) -> VisionFeatures:
        v = self.vision
        return VisionFeatures(
            shallow=torch.cat([v[f"{reference}_shallow{i}"] for i in (1, 2, 3)], dim=1),
            deep=v[f"{reference}_deep"],
            local=v[f"{reference}_deep_local"],
        )

    def keys_values(self, reference: str, adapter: RealCustomAdapter | None = None):
        """Keys and values of a reference for each batch item."""
        adapter = adapter or self.pipeline.adapter
        keys_values = adapter(self.features(reference))
        first = next(iter(keys_values.values()))[0]
        return [
            PackedKeysValues.pack(
                ((n, k[i : i + 1], v[i : i + 1]) for n, (k, v) in keys_values.items()), adapter.config["layers"], first
            )
            for i in range(self.batch)
        ]

    def generations(
        self, references=("ref1",), phrases=("phrase",), adapter=None, scheduler=None, scope_ratio=None, **settings
    ):
        """One generation per batch item at the stored timestep, with the stored references."""
        meta = self.meta
        subjects = tuple(
            Subject(image=self.image_of(reference), target_phrase=meta[phrase], scope_ratio=scope_ratio)
            for reference, phrase in zip(references, phrases, strict=True)
        )
        request = Request(
            prompt=meta["prompt"],
            negative_prompt=meta["negative_prompt"],
            subjects=subjects,
            guidance_scale=meta["guidance_scale"],
            seed=0,
            **settings,
        )
        generations = []
        per_reference = [self.keys_values(r, adapter) for r in references]
        for i in range(self.batch):
            generation = self.pipeline.prepare(request, latents=self.inputs["latent"][i], scheduler=scheduler)
            generation.references = tuple(r[i] for r in per_reference)
            if "num_inference_steps" not in settings:
                generation.scheduler.timesteps = self.inputs["timestep"][None]
            generations.append(generation)
        return generations


@pytest.fixture(scope="module")
def golden(request) -> GoldenSet:
    torch.set_grad_enabled(False)
    torch.backends.cudnn.allow_tf32 = False  # the numbers are of full fp32
    yield GoldenSet(FOLDER, request.config.getoption("--device"))
    torch.set_grad_enabled(True)


def close(computed: torch.Tensor, stored: torch.Tensor, tolerance: float) -> None:
    """Assert equal shapes and an absolute difference of at most `tolerance`."""
    assert computed.shape == stored.shape, (computed.shape, stored.shape)
    assert (computed - stored).abs().max().item() <= tolerance


def method_of(strategy: list[str]) -> MethodConfig:
    """The release's method with a mask strategy, given by the names in the authors' code."""
    names = {"max_norm": "max", "min_max_norm": "min_max", "min_max_per_channel": "min_max_per_layer"}
    return replace(
        MethodConfig.preset("release"),
        mask_normalization=next((name for official, name in names.items() if official in strategy), "none"),
        mask_selection="threshold" if "threshold" in strategy else "top_k",
        mask_binary="binary" in strategy,
    )


def same_mask(computed: torch.Tensor, stored: torch.Tensor, tolerance: float) -> None:
    """Assert that kept positions are identical and values agree within the tolerance."""
    assert torch.equal(computed > 0, stored > 0)
    close(computed, stored, tolerance)


def test_text_embeddings_and_target_tokens(golden):
    """Embeddings and pooled embeddings of both prompts, the tokens of both phrases and the size condition match."""
    (generation, *_) = golden.generations(("ref1", "ref2"), ("phrase", "phrase_2"))
    inputs = golden.inputs
    close(generation.text.embeds, inputs["prompt_embeds"][0], 1e-5)
    close(generation.text.pooled, inputs["pooled"][0], 1e-5)
    close(generation.negative_text.embeds, inputs["negative_prompt_embeds"][0], 1e-5)
    close(generation.negative_text.pooled, inputs["negative_pooled"][0], 1e-5)
    assert torch.equal(generation.target_tokens[0], inputs["target_token"][0])
    assert torch.equal(generation.target_tokens[1], inputs["target_token_2"][0])
    assert torch.equal(generation.time_ids, inputs["time_ids"][0])


def test_reference_images_before_the_encoders(golden):
    """Resizing, interleaved local views and truncation to 8 bits reproduce the input images of the encoders."""
    method = MethodConfig.preset("release")
    size = golden.encoders[0].config.image_size
    for reference in ("ref1", "ref2"):
        if f"{reference}_image_resized" not in golden.vision:
            continue
        stored = golden.vision[f"{reference}_image_resized"]
        computed = to_pixels([golden.image_of(reference)], 2 * size, method)
        close(computed, stored[:1], 1e-6)
        view, local = reference_views(stored, method)
        to_uint8 = lambda x: (x * 255).round().to(torch.uint8).movedim(-3, -1)
        assert torch.equal(to_uint8(view), golden.vision[f"{reference}_global_uint8"])
        assert torch.equal(to_uint8(local.flatten(0, 1)), golden.vision[f"{reference}_local_uint8"])


@pytest.mark.parametrize("reference", ["ref1", "ref2", "neg"])
def test_vision_features(golden, reference):
    """The block outputs of both encoders match for the source images and for the black image."""
    encoders = golden.pipeline.vision_encoders
    computed, stored = encoders.encode([golden.image_of(reference)]), golden.features(reference)
    for part in ("shallow", "deep", "local"):
        close(getattr(computed, part), getattr(stored, part)[:1], golden.tolerance("projector"))


@pytest.mark.parametrize("kind,reference", [("highres", "ref1"), ("highres", "ref2"), ("highres", "neg"),
                                            ("shallow", "ref1"), ("shallow", "neg")])  # fmt: skip
def test_projectors(golden, kind, reference):
    """The outputs of both projectors of the release match."""
    adapter = golden.adapter(shallow=kind == "shallow")
    close(adapter.projector(golden.features(reference)), golden.outputs[f"projector_{kind}/{reference}"],
          golden.tolerance("projector"))  # fmt: skip


def test_cross_scale_attention(golden):
    """The cross-scale attention (Eq. 7) of the highres projector matches."""
    features = golden.features("ref1")
    computed = golden.pipeline.adapter.projector.cross_scale_attention(features.deep, features.local)
    close(computed, golden.outputs["min_attention_highres/ref1"], golden.tolerance("projector"))


def test_guidance_pass_and_its_recorded_maps(golden):
    """The text-only pass matches: its noise, the recorded maps of each layer (summed over words, averaged over heads)
    and the resulting masks."""
    generations = golden.generations()
    denoiser = golden.pipeline.denoiser
    computed, _ = denoiser.predict(generations, [g.text for g in generations])
    close(computed, golden.outputs["unet_guidance"], golden.tolerance("unet_guidance"))

    recorder = AttentionRecorder(
        denoiser.attention.levels, denoiser.method.mask_maps, stack_columns([g.target_tokens for g in generations])
    )
    with denoiser.attention.attention_context(recordings=recorder.layers):
        golden.unet(
            torch.stack([g.model_input() for g in generations]),
            torch.stack([g.timestep for g in generations]),
            encoder_hidden_states=torch.stack([g.text.embeds for g in generations]),
            added_cond_kwargs={
                "text_embeds": torch.stack([g.text.pooled for g in generations]),
                "time_ids": torch.stack([g.time_ids for g in generations]),
            },
        )
    recorded = recorder.cross_maps
    assert list(recorded) == golden.meta["attn2_layers_in_order"]
    target = golden.inputs["target_token"][0].bool()
    for name, stored in golden.crossmaps.items():
        _, _, layer = name.split("/")
        close(recorded[layer][1][:, 0], stored[:, :, target].sum(2).mean(1).flatten(1), golden.tolerance("crossmaps"))
    denoiser.guidance_branch(generations)
    for generation, stored in zip(generations, golden.outputs["mask/max_norm/0.25"], strict=True):
        same_mask(generation.guidance_masks, stored, golden.tolerance("crossmaps"))


def stored_maps(golden, token: str) -> list[torch.Tensor]:
    """The stored maps of the target words of each layer [B, h, w], in forward order."""
    marks = golden.inputs[token][0]
    return [(m.mean(1) * marks[None, :, None, None]).sum(1) for _, m in sorted(golden.crossmaps.items())]


def test_every_mask_strategy(golden):
    """All mask strategies of the release keep exactly the same positions at every stored scope."""
    size = tuple(golden.meta["mask_target"])
    for name, strategy in golden.meta["mask_strategies"].items():
        method = method_of(strategy)
        for scope in golden.meta["mask_scopes"]:
            relevance = aggregate_attention_maps(stored_maps(golden, "target_token"), size, method.mask_normalization)
            for computed, stored in zip(relevance, golden.outputs[f"mask/{name}/{scope}"], strict=True):
                same_mask(guidance_masks(computed[None], [scope], method), stored, golden.tolerance("crossmaps"))


def test_mask_at_an_odd_size_and_without_target(golden):
    """Masks match at an odd size and for maps that are all zero."""
    method = MethodConfig.preset("release")
    maps = stored_maps(golden, "target_token")
    odd = aggregate_attention_maps(maps, tuple(golden.meta["mask_target_odd"]), "max")
    none = aggregate_attention_maps([m * 0 for m in maps], tuple(golden.meta["mask_target"]), "max")
    for relevance, name in ((odd, "mask_odd_target/max_norm/0.25"), (none, "mask_no_target/max_norm/0.25")):
        for computed, stored in zip(relevance, golden.outputs[name], strict=True):
            same_mask(guidance_masks(computed[None], [0.25], method), stored, golden.tolerance("crossmaps"))


def predict_generation_row(golden, generations, masks, *, negative: bool = False) -> torch.Tensor:
    """Run the generation pass or the negative pass alone; masks [B, S, h, w], or None for unmasked attention."""
    denoiser = golden.pipeline.denoiser
    black = golden.keys_values("neg")
    references = [(black[i],) * len(g.references) if negative else g.references for i, g in enumerate(generations)]
    sizes = denoiser.sizes(generations[0])
    for i, g in enumerate(generations):
        g.set_masks(torch.ones(len(g.references), *sizes[0], device=golden.device) if masks is None else masks[i])
    texts = [g.negative_text if negative else g.text for g in generations]
    return denoiser.predict(generations, texts, references=references)[0]


def test_generation_negative_and_guided_passes(golden):
    """The generation pass, its attention layers, the negative pass, their combination (Eq. 17) and the unmasked
    generation pass match."""
    outputs, generations = golden.outputs, golden.generations()
    layer_outputs = {}
    hooks = [
        golden.unet.get_submodule(name.removeprefix("attn2_output/")).register_forward_hook(
            lambda module, args, out, name=name: layer_outputs.__setitem__(name, out)
        )
        for name in outputs
        if name.startswith("attn2_output/")
    ]
    masks = outputs["mask/max_norm/0.25"]
    close(predict_generation_row(golden, generations, masks), outputs["unet_gen"], golden.tolerance("unet_gen"))
    for hook in hooks:
        hook.remove()
    assert layer_outputs
    for name, out in layer_outputs.items():
        # The set has no tolerance for single layers. Their values are larger, so the tolerance is scaled accordingly.
        close(out, outputs[name], golden.tolerance("unet_gen") * max(1, outputs[name].abs().max().item()))
    close(
        predict_generation_row(golden, generations, masks, negative=True),
        outputs["unet_neg"],
        golden.tolerance("unet_neg"),
    )
    close(torch.stack(golden.pipeline.denoiser.generation_branch(generations)), outputs["cfg"], golden.tolerance("cfg"))
    close(predict_generation_row(golden, generations, None), outputs["unet_gen_no_mask"], golden.tolerance("unet_gen"))


def test_generation_pass_with_the_shallow_projector(golden):
    """The generation pass matches with references of the shallow projector."""
    generations = golden.generations(adapter=golden.adapter(shallow=True))
    computed = predict_generation_row(golden, generations, golden.outputs["mask/max_norm/0.25"])
    close(computed, golden.outputs["unet_gen_shallow"], golden.tolerance("unet_gen"))


def test_two_references(golden):
    """With two references, the masks of both scopes, all passes and their combination match."""
    outputs = golden.outputs
    generations = golden.generations(("ref1", "ref2"), ("phrase", "phrase_2"))
    for g in generations:
        first, second = g.request.subjects
        g.request = replace(g.request, subjects=(replace(first, scope_ratio=0.25), replace(second, scope_ratio=0.2)))
    golden.pipeline.denoiser.guidance_branch(generations)
    for g, stored in zip(generations, outputs["multi/masks"], strict=True):
        same_mask(g.guidance_masks, stored, golden.tolerance("crossmaps"))
    masks = outputs["multi/masks"]
    close(
        predict_generation_row(golden, generations, None),
        outputs["multi/unet_gen_no_mask"],
        golden.tolerance("unet_gen"),
    )
    close(predict_generation_row(golden, generations, masks), outputs["multi/unet_gen"], golden.tolerance("unet_gen"))
    computed = predict_generation_row(golden, generations, masks, negative=True)
    close(computed, outputs["multi/unet_neg"], golden.tolerance("unet_neg"))
    close(
        torch.stack(golden.pipeline.denoiser.generation_branch(generations)),
        outputs["multi/cfg"],
        golden.tolerance("cfg"),
    )


LOOPS = {"ddim": None, "dpm_reuse2": AlternatingDPMSolverScheduler()}


@pytest.mark.parametrize("name", LOOPS)
def test_sampling_loop(golden, name, monkeypatch):
    """Masks, latents and clean estimates match after every step, with all images in one batch."""
    settings = golden.meta["loops"][name]
    steps, scope = settings["steps"], settings["mask_scope"]
    for part in (golden.pipeline.denoiser, golden.pipeline.denoiser.executor):
        monkeypatch.setattr(part, "method", method_of(settings["mask_strategy"]))
    stop = min(steps, settings["mask_reused_step"])
    generations = golden.generations(
        scheduler=LOOPS[name], scope_ratio=scope, num_inference_steps=steps, early_stop_step=stop
    )
    assert generations[0].scheduler.timesteps.tolist() == settings["timesteps"]
    stored = {part: golden.loops[f"{name}/{part}"] for part in ("latents", "masks", "pred_original_sample")}
    for step in range(steps):
        golden.pipeline.step(generations)
        for i, g in enumerate(generations):
            assert torch.equal(g.guidance_masks > 0, stored["masks"][step, i] > 0)
            close(g.latents, stored["latents"][step, i], golden.tolerance("loop"))
            close(g.predicted_clean, stored["pred_original_sample"][step, i], golden.tolerance("loop"))
    decoded = torch.stack([golden.pipeline.final_latents(g) for g in generations])
    close(decoded, stored["pred_original_sample"][-1], golden.tolerance("loop"))


def test_stored_phrase_positions_that_are_whole_words(golden):
    """The same tokens are marked if the release marks whole words; cases where it marks parts of words are skipped."""
    tokenizer = golden.pipeline.tokenizer
    compared = 0
    for case in golden.meta["phrase_cases"]:
        try:
            spans = find_phrase(case["text"], case["phrase"])
        except ValueError:
            continue
        if [start for start, _ in spans] == case["char_positions"]:
            computed = target_token_positions(tokenizer, case["text"], case["phrase"])
            assert computed == case["target_token_indices"], case
            compared += 1
    assert compared >= 3
