"""LoRA loading as in diffusers, for SDXL and SD1.5. Caches are cleared after each change of weights."""

from functools import wraps

from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

from .memory import encoders_without_hooks


def _clearing_caches(name: str):
    change = getattr(StableDiffusionXLLoraLoaderMixin, name)

    @wraps(change)
    def changed(self, *args, **options):
        try:
            with encoders_without_hooks(self):
                return change(self, *args, **options)
        finally:
            self.clear_caches()  # a LoRA may also change the text encoders

    return changed


class LoraLoader(StableDiffusionXLLoraLoaderMixin):
    """`load_lora_weights` and all other methods that change weights, each followed by `clear_caches`.

    SDXL's loader also reads SD1.5 files. The only difference is that it looks for weights of a second text encoder.
    """

    load_lora_weights = _clearing_caches("load_lora_weights")
    unload_lora_weights = _clearing_caches("unload_lora_weights")
    fuse_lora = _clearing_caches("fuse_lora")
    unfuse_lora = _clearing_caches("unfuse_lora")
    set_adapters = _clearing_caches("set_adapters")
    delete_adapters = _clearing_caches("delete_adapters")
    enable_lora = _clearing_caches("enable_lora")
    disable_lora = _clearing_caches("disable_lora")
