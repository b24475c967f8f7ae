"""Sources of the models that a Triton server runs in its Python backend; none of them imports torch.

``text/model.py`` and ``image/model.py`` become the front ends of a repository, ``backends/`` serves towers
on a server that pip installed. A ``model.py`` only translates between Triton's objects and the plain code
beside it.
"""
