"""The folder of a run's output: its workers, its kept columns, its finished files and its state."""
