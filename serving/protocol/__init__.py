"""Shared by clients and server: errors, events, limits, model information, image codec. No torch, no ray."""
