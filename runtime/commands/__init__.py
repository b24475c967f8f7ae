"""The commands of ``babeltower``."""
