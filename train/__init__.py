"""Training: the adapter for SDXL, SD1.5 or the embedded model, and pretraining and evaluation of the embedded model."""
