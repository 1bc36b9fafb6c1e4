"""Stage `vision`: the two small vision encoders. A full-size model uses pretrained ones instead.

Five losses train them:

- contrastive: two views of an instance are closer to each other than to other instances of the category (last block);
- category: the mean of the tokens on an instance predicts its category (last block);
- appearance: the deep features reconstruct the instance upright, independent of its pose in the view;
- structure: each deep token reconstructs its own patch;
- correspondence: each deep token predicts the category of the subject it shows and its position on that subject, so
  that visual attention can find the tokens that show the same part. DINOv2's tokens have this property.

The first three use only the tokens that lie on the instance, and half of the views contain a second subject. Each token
therefore describes only the subject it lies on. Otherwise, the features of a reference with two subjects (One2Many)
would mix them. Training uses global views and local crops, because the projector reads both.

Legend: B images, N = 64 tokens (8 x 8), C channels of both encoders together.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from realcustom.config import MethodConfig, VisionConfig
from realcustom.pipeline import RealCustomPipeline
from realcustom.vision import VisionEncoders

from ..data.sprite_world.renderer import Renderer
from ..data.sprite_world.scenes import SCENE_SIZE
from ..data.sprite_world.surfaces import crop_homography, positions_on_subjects
from ..data.sprite_world.world import TRAINED_CATEGORIES
from ..images import save_grid
from ..precision import autocast
from .loop import LoopConfig, load_stage, run_loop
from .networks import VISION_SIZE, VISION_WIDTH, build_vision_encoders
from .stream import SampleStream
from .views import GRID, ViewMixture, Views, render_view_batch

BATCH_SIZE, GPU_BATCH_SIZE = 24, 768
NUM_HELD_OUT = 64
TEMPERATURE = 0.1
MINI_VISION = VisionConfig(siglip_shallow=(0, 1, 2), siglip_deep=3, dino_shallow=(0, 1, 2), dino_deep=3)


class VisionPretrainer(nn.Module):
    """Both encoders with the small heads that only their training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.siglip, self.dino = build_vision_encoders()
        # On a CPU, the backward pass of eager attention is faster than that of the fused kernel.
        self.siglip.set_attn_implementation("eager")
        self.dino.set_attn_implementation("eager")
        width = 2 * VISION_WIDTH
        self.embed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 96))
        self.classify = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(TRAINED_CATEGORIES)))
        # Linear, because the adapter compares tokens with queries by linear projections.
        self.locate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(TRAINED_CATEGORIES) + 2))
        self.decode_patch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * 16))  # 4 x 4 px of a 32 px copy
        self.portrait_norm = nn.LayerNorm(width)
        self.portrait_queries = nn.Parameter(torch.randn(64, width) * 0.1)  # one for each 4 x 4 px of the portrait
        self.portrait_attention = nn.MultiheadAttention(width, 6, batch_first=True)
        self.decode_portrait = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 48)
        )

    def encoders(self) -> VisionEncoders:
        """The encoders without the heads."""
        return VisionEncoders(self.siglip, self.dino, MINI_VISION, MethodConfig())

    def portrait(self, deep: Tensor, inside: Tensor) -> Tensor:
        """Reconstruct the portrait from the deep tokens [B, N, C] where `inside` [B, N] is true; [B, 3, 32, 32]."""
        tokens = self.portrait_norm(deep)
        queries = self.portrait_queries.to(tokens.dtype).expand(len(deep), -1, -1)
        attended, _ = self.portrait_attention(queries, tokens, tokens, key_padding_mask=~inside, need_weights=False)
        return _fold(self.decode_portrait(queries + attended))

    def patches(self, deep: Tensor) -> Tensor:
        """Reconstruct the view from the deep tokens [B, N, C], each token its own patch; [B, 3, 32, 32]."""
        return _fold(self.decode_patch(deep))


def tokens_of_blocks(encoders: VisionEncoders, pixels: Tensor) -> list[Tensor]:
    """[B, 3, 64, 64] in [0, 1] -> tokens of every block, each [B, N, C]."""
    return encoders.tokens(pixels, [(i, i) for i in range(encoders.siglip.config.num_hidden_layers)])


def _fold(tokens: Tensor) -> Tensor:
    """[B, 64, 48] -> [B, 3, 32, 32]."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(-1, (8, 8)), 4)


def vision_loss(
    model: VisionPretrainer,
    views: Views,
    generator: torch.Generator,
    kept: VisionEncoders | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Weighted sum of the five losses and, with `kept`, of the change of the features.

    Args:
        generator: of the position of the local crops.
        kept: encoders whose features the model should keep, see `change_of_features`.
    """
    count = len(views.portraits)
    top, left = torch.randint(0, SCENE_SIZE - VISION_SIZE + 1, (2,), generator=generator).tolist()
    crops = views.images[:count, :, top : top + VISION_SIZE, left : left + VISION_SIZE]
    images = torch.cat([F.avg_pool2d(views.images, SCENE_SIZE // VISION_SIZE), crops])
    blocks = tokens_of_blocks(model.encoders(), images)
    deep, last = blocks[MINI_VISION.siglip_deep], blocks[-1]
    inside = views.inside
    summary = (last[: 2 * count] * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)
    patches = (model.patches(deep).float() - F.avg_pool2d(images, 2)).abs().mean()
    portrait = model.portrait(deep[: 2 * count], inside).float() - views.portraits.repeat(2, 1, 1, 1)
    portrait = portrait.abs().mean() + 2 * portrait.pow(2).mean()
    box = torch.tensor([[left, top, left + VISION_SIZE, top + VISION_SIZE]], device=deep.device) / SCENE_SIZE
    where = torch.cat([views.homographies, views.homographies[:count] @ crop_homography(box)])
    labels = torch.cat([views.categories, views.categories[:count]])
    token_category, token_position = token_losses(model.locate(deep).float(), where, labels)
    embedded = F.normalize(model.embed(summary).float(), dim=-1)
    similarity = embedded[:count] @ embedded[count:].T / TEMPERATURE
    same = torch.arange(count, device=similarity.device)
    contrast = (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2
    category = F.cross_entropy(model.classify(summary).float(), views.category.repeat(2))
    loss = 2 * patches + 3 * portrait + 0.3 * contrast + 0.2 * category + 0.3 * token_category + token_position
    metrics = {
        "patches": patches,
        "portrait": portrait,
        "contrast": contrast,
        "category": category,
        "token_category": token_category,
        "token_position": token_position,
        "retrieval_accuracy": (similarity.argmax(1) == same).float().mean(),
    }
    if kept is not None:
        with torch.no_grad():
            before = tokens_of_blocks(kept, images)
        read = slice(MINI_VISION.siglip_deep + 1)  # the projector reads no later block
        metrics["change"] = change_of_features(blocks[read], before[read])
        loss = loss + metrics["change"]
    return loss, {name: float(value.detach()) for name, value in metrics.items()}


def token_losses(predicted: Tensor, where: Tensor, categories: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the category and squared error of the position, for the tokens that show exactly one subject.

    Args:
        predicted: logits of the categories and position, as fractions of the subject's sides, [B, N, categories + 2].
        where: homographies of the subjects, [B, S, 3, 3].
        categories: int64 [B, S].
    """
    positions, shown = positions_on_subjects(where, GRID)
    image, subject, token = (shown & (shown.sum(1, keepdim=True) == 1)).nonzero(as_tuple=True)
    found = predicted[image, token]
    category = F.cross_entropy(found[:, :-2], categories[image, subject])
    return category, (found[:, -2:] - positions[image, subject, token]).square().mean()


def change_of_features(now: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """Squared change of the tokens of each block relative to the variance of their channels; mean over the blocks."""
    changes = []
    for new, old in zip(now, before, strict=True):
        new, old = new.float(), old.float()
        changes.append(((new - old).square().mean((0, 1)) / old.var((0, 1)).clamp_min(1e-6)).mean())
    return torch.stack(changes).mean()


def default_batch_size(device: str) -> int:
    """Instances per step."""
    return BATCH_SIZE if device == "cpu" else GPU_BATCH_SIZE


def train_vision(
    out: Path, device: str = "cpu", keep: Path | None = None, batch_size: int | None = None, **options
) -> None:
    """Train the vision encoders; checkpoints and logs go to `out`.

    Args:
        keep: folder of a model whose features the encoders should keep while they learn, so that its adapter remains
            usable.
        batch_size: instances per step; None for `default_batch_size`.
        options: fields of `LoopConfig`.
    """
    batch_size = batch_size or default_batch_size(device)
    config = LoopConfig(
        out=out,
        batch_size=batch_size,
        learning_rate=1e-3 * (batch_size / BATCH_SIZE) ** 0.25,
        ema_decay=0.995,
        preview_every_s=120,
        save_every_s=120,
        **options,
    )
    torch.manual_seed(1)
    model = VisionPretrainer().to(device)
    kept = None if keep is None else load_encoders(keep, device)
    renderer = Renderer(device)
    stream = SampleStream(ViewMixture(batch_size))

    def loss_of_step(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        views = render_view_batch(stream.samples(step), renderer)
        with autocast(device):
            return vision_loss(model, views, generator, kept)

    held_out = render_view_batch(ViewMixture(NUM_HELD_OUT, split="held_out").samples(0, range(NUM_HELD_OUT)), renderer)

    def preview(step: int) -> dict[str, float]:
        loss, metrics = vision_loss(model, held_out, torch.Generator().manual_seed(0), kept)
        shown = held_out.images[:16]
        deep = tokens_of_blocks(model.encoders(), F.avg_pool2d(shown, 2))[MINI_VISION.siglip_deep]
        rows = [
            F.avg_pool2d(shown, 4),
            model.patches(deep),
            held_out.portraits[:16],
            model.portrait(deep, held_out.inside[:16]),
        ]
        save_grid(torch.cat(rows).float() * 2 - 1, out / "preview.png", columns=16)
        return {f"held_out_{name}": round(value, 4) for name, value in {"loss": float(loss), **metrics}.items()}

    with closing(stream):
        run_loop(config, model, loss_of_step, preview)


def load_encoders(folder: Path, device: str) -> VisionEncoders:
    """The frozen vision encoders of a model folder."""
    encoders = RealCustomPipeline.from_pretrained(folder).vision_encoders
    assert encoders is not None
    for encoder in (encoders.siglip, encoders.dino):
        encoder.to(device, torch.float32).requires_grad_(False).eval()
    return encoders


def load_vision(out: Path, device: str = "cpu") -> VisionEncoders:
    """The encoders of `out/vision` with their EMA weights, frozen."""
    model = load_stage(out / "vision", VisionPretrainer())
    return model.to(device).requires_grad_(False).eval().encoders()
