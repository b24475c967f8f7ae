"""Registry of layouts. To add one, write its file and add a row."""

from __future__ import annotations

from collections.abc import Mapping

from export.layouts.immich import IMMICH
from export.layouts.layout import Layout
from export.layouts.names import LayoutName
from export.layouts.web.layout import WEB

__all__ = ["LAYOUTS"]

LAYOUTS: Mapping[LayoutName, Layout] = {layout.name: layout for layout in (IMMICH, WEB)}
