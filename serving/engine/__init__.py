"""Step-level continuous batching on one pipeline. `scheduler.py` decides who runs next; `engine.py` owns threads."""
