"""Commands of ``babeltower``."""
