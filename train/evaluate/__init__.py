"""Evaluation of the embedded model with classifiers that are trained independently of it."""
