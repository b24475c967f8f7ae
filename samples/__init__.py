"""Sample data and small trained checkpoints in the on-disk formats of the three families."""
