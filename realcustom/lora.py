"""LoRA as diffusers loads it, for SDXL and SD1.5 alike; texts encoded with the former weights are forgotten."""

from functools import wraps

from diffusers.loaders import StableDiffusionXLLoraLoaderMixin


def _then_forget(name: str):
    change = getattr(StableDiffusionXLLoraLoaderMixin, name)

    @wraps(change)
    def changed(self, *args, **options):
        try:
            return change(self, *args, **options)
        finally:
            self.clear_caches()  # a LoRA may reach the text encoders, too

    return changed


class LoraLoader(StableDiffusionXLLoraLoaderMixin):
    """`load_lora_weights` and what else changes weights, followed by `clear_caches`.

    SDXL's loader reads the files of SD1.5, too: it only looks for a second text encoder's weights besides.
    """

    load_lora_weights = _then_forget("load_lora_weights")
    unload_lora_weights = _then_forget("unload_lora_weights")
    fuse_lora = _then_forget("fuse_lora")
    unfuse_lora = _then_forget("unfuse_lora")
    set_adapters = _then_forget("set_adapters")
    delete_adapters = _then_forget("delete_adapters")
    enable_lora = _then_forget("enable_lora")
    disable_lora = _then_forget("disable_lora")
