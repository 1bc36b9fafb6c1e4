"""What clients and server share: errors, events, limits, model information, image codec. Imports no torch, no ray."""
