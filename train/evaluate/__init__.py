"""Evaluation of the embedded model by classifiers that are trained independently of it."""
