"""The stages of the embedded model's recipe, in order: vae, base, vision, adapter."""
