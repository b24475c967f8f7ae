"""The logger of the project, ``babeltower``: silent until an application configures logging.

Warnings tell what weakens a promise (checks that were skipped, requests that are repeated); ``INFO`` tells
what changed by itself (a server that answers again, another version of a model).
"""

from __future__ import annotations

import logging

__all__ = ["LOGGER"]

LOGGER = logging.getLogger("babeltower")
LOGGER.addHandler(logging.NullHandler())
