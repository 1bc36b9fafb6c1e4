"""Training data: sources of records, and the mixture that turns (seed, step, position) into a sample.

`sample` the types; `order` and `plan` which record comes when; `mixture` a sample of a step; `loader` batches and their
worker processes.
"""
