"""RealCustomAdapter: the weights that RealCustom++ adds to a frozen text-to-image model.

The keys and values of a reference do not depend on the timestep or the text, so `forward` computes them once per
reference, and the attention processors own no weights. In the diffusers layout, the adapter has its own folder.
"""

from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from .keys_values import KeysValues, PackedKeysValues
from .projector import CrossLayerCrossScaleProjector
from .vision import VisionFeatures


def cross_attention_layers(unet) -> dict[str, int]:
    """Name and channels of every text cross-attention layer of a UNet, in the order of its module tree.

    Names are those of the state dict, such as "mid_block.attentions.0.transformer_blocks.0.attn2".
    """
    return {
        name: module.inner_dim
        for name, module in unet.named_modules()
        if name.endswith(".attn2") and module.is_cross_attention
    }


class RealCustomAdapter(ModelMixin, ConfigMixin):
    """Projector (Eq. 5-9) and the visual key and value projections of every cross-attention layer (Eq. 4).

    Args:
        layers: name and channels of the UNet's cross-attention layers (see `cross_attention_layers`).
        vision_dim, condition_dim, head_dim, cross_layer, cross_scale: see `CrossLayerCrossScaleProjector`.
    """

    @register_to_config
    def __init__(
        self,
        layers: dict[str, int],
        vision_dim: int = 2176,
        condition_dim: int = 2048,
        head_dim: int = 64,
        cross_layer: bool = True,
        cross_scale: bool = True,
    ) -> None:
        super().__init__()
        self._layer_names = tuple(layers)
        self.projector = CrossLayerCrossScaleProjector(vision_dim, condition_dim, head_dim, cross_layer, cross_scale)
        # Module names must not contain dots, so dots in layer names become dashes.
        self.to_k_vision = nn.ModuleDict(
            {_key(name): nn.Linear(condition_dim, d, bias=False) for name, d in layers.items()}
        )
        self.to_v_vision = nn.ModuleDict(
            {_key(name): nn.Linear(condition_dim, d, bias=False) for name, d in layers.items()}
        )

    @classmethod
    def for_unet(cls, unet, *, vision_dim: int, **options) -> "RealCustomAdapter":
        """Create an untrained adapter for `unet`. W_Ki and W_Vi are initialized from the UNet's text projections.

        Args:
            vision_dim: channels of both vision encoders together.
            options: head_dim, cross_layer and cross_scale of the constructor.
        """
        layers = cross_attention_layers(unet)
        adapter = cls(layers=layers, vision_dim=vision_dim, condition_dim=unet.config.cross_attention_dim, **options)
        modules = dict(unet.named_modules())
        for name in layers:
            attention: Any = modules[name]
            adapter.to_k_vision[_key(name)].load_state_dict({"weight": attention.to_k.weight})
            adapter.to_v_vision[_key(name)].load_state_dict({"weight": attention.to_v.weight})
        return adapter

    def forward(self, features: VisionFeatures, packed: bool = False) -> KeysValues:
        """Keys and values [B, tokens, channels] of every layer for a batch of references.

        Args:
            packed: return them as `PackedKeysValues`, for one reference and without gradients.
        """
        condition = self.projector(features)
        layers = (
            (name, self.to_k_vision[_key(name)](condition), self.to_v_vision[_key(name)](condition))
            for name in self._layer_names
        )
        if packed:
            return PackedKeysValues.pack(layers, self.config["layers"], like=condition)
        return {name: (keys, values) for name, keys, values in layers}


def _key(layer: str) -> str:
    return layer.replace(".", "-")
