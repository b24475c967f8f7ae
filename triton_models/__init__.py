"""Models for Triton's Python backend; none of them imports torch.

``text/model.py`` and ``image/model.py`` become the front ends of a repository; ``backends/`` serves towers on
a pip-installed server. A ``model.py`` only converts between Triton's objects and the plain code beside it.
"""
