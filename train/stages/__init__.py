"""Training stages of the embedded model, in order: vae, base, vision, adapter."""
