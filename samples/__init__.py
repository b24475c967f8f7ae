"""Sample data and sample checkpoints: small, real, and in the on-disk formats of the three families."""
