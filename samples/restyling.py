"""Redraw an SVG in another style: other colours, no gradients, outlines, no shades, displaced parts.

A vendor draws every emoji in one style, so a tower trained on few vendors mistakes style for content.
Drawings are vectors, so their style can be changed at its source, which no change of pixels can imitate.
"""

from __future__ import annotations

import colorsys
import random
import re
from collections.abc import Callable

COLOUR = re.compile(
    r"""(?P<before>\b(?:fill|stroke|stop-color)(?:="|:\s*))(?P<colour>#[0-9a-fA-F]{3,6}\b|white\b|black\b)"""
)
GRADIENT = re.compile(r"<(linear|radial)Gradient\b.*?</\1Gradient>", re.DOTALL)
SHADE = re.compile(r"""\b(?P<name>(?:fill-|stroke-)?opacity)="(?P<value>0?\.\d+)\"""")
PART = re.compile(r"<(?P<tag>path|circle|ellipse|rect|polygon|g)\b(?P<attributes>[^>]*)>")
NAMED = {"white": "#ffffff", "black": "#000000"}

Rgb = tuple[float, float, float]


def restyled(body: str, side: float, draw: random.Random) -> str:
    """Redraw an SVG body in a random style.

    Args:
        body: Elements of the drawing, without the ``svg`` element.
        side: Side of the drawing in user units.
        draw: Source of randomness.

    Returns:
        Body of the same size.
    """
    if draw.random() < 0.5:
        body = GRADIENT.sub(_flattened, body)
    if draw.random() < 0.3:
        body = SHADE.sub(lambda match: f'{match["name"]}="0"', body)
    body = _recoloured(body, _random_palette(draw))
    if draw.random() < 0.5:
        body = _displaced(body, side, draw)
    if draw.random() < 0.35:
        body = _outlined(body, side, draw)
    return body


def _flattened(gradient: re.Match[str]) -> str:
    """Give all stops of a gradient their mean colour."""
    colours = [rgb_from_text(match["colour"]) for match in COLOUR.finditer(gradient[0])]
    if not colours:
        return gradient[0]
    mean = text_from_rgb(tuple(sum(parts) / len(colours) for parts in zip(*colours, strict=True)))
    return COLOUR.sub(lambda match: match["before"] + mean, gradient[0])


def _recoloured(body: str, palette: Callable[[Rgb], Rgb]) -> str:
    """Change every colour, equal ones equally."""
    known: dict[str, str] = {}

    def changed(match: re.Match[str]) -> str:
        colour = match["colour"].lower()
        if colour not in known:
            known[colour] = text_from_rgb(palette(rgb_from_text(colour)))
        return match["before"] + known[colour]

    return COLOUR.sub(changed, body)


def _random_palette(draw: random.Random) -> Callable[[Rgb], Rgb]:
    """Return a random change of colours: a common one of hue, saturation and lightness, and one each."""
    turn = draw.gauss(0, 0.02) if draw.random() < 0.8 else draw.random()
    richness, light = draw.gauss(0, 0.35), draw.gauss(0, 0.25)
    if draw.random() < 0.1:
        richness = -20.0  # grey

    def changed(rgb: Rgb) -> Rgb:
        hue, lightness, saturation = colorsys.rgb_to_hls(*rgb)
        hue = (hue + turn + draw.gauss(0, 0.02)) % 1
        saturation = min(1.0, saturation * 2.0 ** (richness + draw.gauss(0, 0.25)))
        lightness = lightness ** (2.0 ** (light + draw.gauss(0, 0.12))) if 0 < lightness < 1 else lightness
        return colorsys.hls_to_rgb(hue, lightness, saturation)

    return changed


def _displaced(body: str, side: float, draw: random.Random) -> str:
    """Move, turn and scale each part a little about the drawing's centre."""
    amount, centre = 0.03 * draw.random(), side / 2

    def moved(match: re.Match[str]) -> str:
        if "transform=" in match["attributes"] or match["tag"] == "g" or draw.random() < 0.3:
            return match[0]
        x, y = (draw.gauss(0, amount) * side for _ in range(2))
        turn, scale = draw.gauss(0, amount) * 90, 1 + draw.gauss(0, amount)
        how = (
            f"translate({centre + x:.3f} {centre + y:.3f}) rotate({turn:.2f}) scale({scale:.3f}) "
            f"translate({-centre:.3f} {-centre:.3f})"
        )
        return f'<{match["tag"]} transform="{how}"{match["attributes"]}>'

    head, definitions, tail = _without_definitions(body)
    return PART.sub(moved, head) + definitions + PART.sub(moved, tail)


def _without_definitions(body: str) -> tuple[str, str, str]:
    """Split off ``defs``, whose clip paths and masks must keep their place."""
    start, end = body.find("<defs>"), body.rfind("</defs>")
    return (body[:start], body[start:end], body[end:]) if 0 <= start < end else (body, "", "")


def _outlined(body: str, side: float, draw: random.Random) -> str:
    """Draw a line around every part that has none."""
    width = side * draw.uniform(0.008, 0.035)
    shade = draw.choice((0.0, 0.0, 0.15, 0.25, 1.0))
    colour = text_from_rgb(
        (shade, shade * draw.random(), shade * draw.random()) if 0 < shade < 1 else (shade,) * 3
    )
    return f'<g stroke="{colour}" stroke-width="{width:.3f}" stroke-linejoin="round">{body}</g>'


def rgb_from_text(colour: str) -> Rgb:
    """Parse ``#rgb``, ``#rrggbb``, ``white`` or ``black`` to 0–1."""
    digits = NAMED.get(colour, colour)[1:]
    if len(digits) < 6:
        digits = "".join(2 * digit for digit in digits[:3])
    red, green, blue = (int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4))
    return red, green, blue


def text_from_rgb(colour: Rgb) -> str:
    """Format 0–1 as ``#rrggbb``."""
    return "#" + "".join(f"{round(255 * min(1.0, max(0.0, part))):02x}" for part in colour)
