"""Training of the embedded model: data, training stages and evaluation."""
