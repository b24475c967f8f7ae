"""Commands that need the export extra."""
