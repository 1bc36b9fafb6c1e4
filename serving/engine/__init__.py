"""Step-level continuous batching on one pipeline. Policy: `scheduler.py` and `plan.py`; threads: `engine.py`."""
