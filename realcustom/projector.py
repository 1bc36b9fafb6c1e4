"""VisionFeatures -> vision condition: the cross-layer cross-scale projector (Eq. 5-9).

Legend: B batch, N vision tokens of the global view, L shallow layers, C vision channels, D channels of the condition.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .vision import VisionFeatures


class DeepQueryAttention(nn.Module):
    """Cross-attention with deep features as queries: over shallow layers (Eq. 5) or local views (Eq. 7).

    There is no output projection and no residual connection, because an MLP follows (Eq. 6 and 8).

    Args:
        dim: C.
        head_dim: channels of an attention head.
    Raises:
        ValueError: `dim` is not a multiple of `head_dim`.
    """

    def __init__(self, dim: int, head_dim: int = 64) -> None:
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"vision_dim is {dim}; it must be a multiple of head_dim, {head_dim}.")
        self.num_heads = dim // head_dim
        self.norm_query = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)

    def forward(self, deep: Tensor, context: Tensor) -> Tensor:
        """Attend from deep features [B, N, C] to a context [B, M, C]; returns [B, N, C]."""
        context = self.norm_context(context)
        query, key, value = (
            tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, tokens, C / H]
            for tokens in (self.to_q(self.norm_query(deep)), self.to_k(context), self.to_v(context))
        )
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _mlp(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(dim, 4 * dim),
        nn.GELU(),
        nn.Linear(4 * dim, out_dim),
        nn.GELU(),
        nn.Linear(out_dim, out_dim),
        nn.LayerNorm(out_dim),
    )


class CrossLayerCrossScaleProjector(nn.Module):
    """The projector of Eq. 9: f_ci = shallow' concatenated with (MLP(deep) + high').

    MLP(deep) is one linear layer, as in the release.

    Args:
        vision_dim: C, channels of the concatenated encoders.
        out_dim: D, channels of the UNet's cross-attention.
        head_dim: channels of an attention head.
        cross_layer: compute shallow' (Eq. 5-6), which doubles the number of tokens.
        cross_scale: add high' (Eq. 7-8). Each of the release's two projectors omits one of the two.
    """

    def __init__(
        self, vision_dim: int, out_dim: int, head_dim: int = 64, cross_layer: bool = True, cross_scale: bool = True
    ) -> None:
        super().__init__()
        self.deep_mlp = nn.Linear(vision_dim, out_dim)
        self.cross_layer_attention = DeepQueryAttention(vision_dim, head_dim) if cross_layer else None
        self.shallow_mlp = _mlp(vision_dim, out_dim) if cross_layer else None
        self.cross_scale_attention = DeepQueryAttention(vision_dim, head_dim) if cross_scale else None
        self.high_mlp = _mlp(vision_dim, out_dim) if cross_scale else None

    def forward(self, features: VisionFeatures) -> Tensor:
        """Vision condition [B, N, D], or [B, 2N, D] with the cross-layer tokens.

        The shallow tokens come last, as in the release. Attention over the tokens does not depend on their order.
        """
        condition = self.deep_mlp(features.deep)
        if self.cross_scale_attention is not None:
            assert self.high_mlp is not None
            condition = condition + self.high_mlp(self.cross_scale_attention(features.deep, features.local))
        if self.cross_layer_attention is not None:
            assert self.shallow_mlp is not None
            shallow = self.shallow_mlp(self.cross_layer_attention(features.deep, features.shallow))
            condition = torch.cat([condition, shallow], dim=1)
        return condition
