"""Step-level continuous batching on one pipeline: `scheduler.py` and `plan.py` hold the policy, `engine.py` the threads."""
