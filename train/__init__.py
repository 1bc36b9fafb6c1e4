"""Training of the embedded model: data, training stages and evaluation. Imports `realcustom`, never the reverse."""
