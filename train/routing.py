"""Places look at their own subject in a reference of several: a small loss on visual attention (One2Many).

With SDXL the vision encoders' features say what they are features of, well enough for the pixels of a cat to find the
cat in a picture of a cat and a car. This small a model has to be told, as `grounding.py` tells it where words live.

Legend: B pictures, S subjects of a reference, N vision tokens, Q positions of a layer, h x w latent size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from realcustom.attention import LayerVision, VisualAttention
from realcustom.recorder import attention_times

ROUTING_WEIGHT = 1.0  # of this loss beside the diffusion loss
EPSILON = 1e-4  # attention below this counts as this much


class WatchedLayer:
    """A `LayerVision` that notes how much each position attends to each subject in its reference: `mass` [B, Q, S].

    Args:
        marks: the tokens of each subject, [B, N, S] of 0 and 1.
    """

    def __init__(self, vision: LayerVision, marks: Tensor) -> None:
        self.vision, self.marks = vision, marks
        self.mass: Tensor | None = None

    def add_to(self, out: Tensor, query: Tensor) -> Tensor:
        key = self.vision.key.unflatten(-1, (query.shape[1], -1)).transpose(1, 2)
        self.mass = attention_times(query, key, self.marks)
        return self.vision.add_to(out, query)


class WatchedVision:
    """A `VisualAttention` whose layers are watched.

    Args:
        seen: where in its reference each subject is, [B, S, grid, grid]. Tokens come in two such grids, see
            `CrossLayerCrossScaleProjector`.

    Attributes:
        layers: (level, layer) of each layer that was connected.
    """

    def __init__(self, vision: VisualAttention, seen: Tensor) -> None:
        self._vision = vision
        self.keys_values = vision.keys_values
        self.marks = seen.flatten(2).transpose(1, 2).repeat(1, 2, 1)
        self.layers: list[tuple[int, WatchedLayer]] = []

    def at(self, layer: str, level: int) -> WatchedLayer:
        watched = WatchedLayer(self._vision.at(layer, level), self.marks)
        self.layers.append((level, watched))
        return watched

    def loss(self, places: Tensor) -> Tensor:
        """-log of the attention that a subject's place gives to that subject's tokens, mean over places and layers.

        Args:
            places: where each subject is in the picture, [B, S, h, w] in [0, 1].
        """
        visible = self.marks.amax(dim=1, keepdim=True)  # a subject may have been cropped away
        losses = []
        for level, layer in self.layers:
            where = F.avg_pool2d(places, 2**level, ceil_mode=True).flatten(2).transpose(1, 2) * visible
            nats = -layer.mass.clamp_min(EPSILON).log()
            losses.append((where * nats).sum() / where.sum().clamp_min(1))
        return torch.stack(losses).mean()
