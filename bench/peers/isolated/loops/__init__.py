"""One module a library: ``opened(task)`` gives a function from inputs to unit vectors."""
