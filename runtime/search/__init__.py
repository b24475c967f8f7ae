"""Search: galleries, answers and their page."""
