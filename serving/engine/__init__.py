"""Step-level continuous batching on one pipeline: `scheduler.py` and `plan.py` decide, `engine.py` runs."""
