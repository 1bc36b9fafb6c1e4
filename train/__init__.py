"""Everything that makes weights: data, training stages, evaluation. Imports `realcustom`, never the other way round."""
