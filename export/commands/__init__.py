"""Commands that require the ``export`` extra."""
