"""What the drawings share: colours, text and the frame of an SVG file."""

from __future__ import annotations

from xml.sax.saxutils import escape

FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
INK, MUTED, PANEL, BORDER = "#0f172a", "#64748b", "#f8fafc", "#e2e8f0"
CHARACTER = 7.2  # px of one character of a label: wide enough for the widest usual sans-serif font


def document(title: str, description: str, width: float, height: float, body: str) -> str:
    """A self-contained SVG file on white."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="{FONT}" font-size="12" fill="{INK}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
        f'<rect width="100%" height="100%" fill="#ffffff"/>{body}</svg>\n'
    )


def draw_text(
    x: float,
    y: float,
    text: str,
    *,
    size: float = 12,
    weight: str = "normal",
    fill: str = INK,
    anchor: str = "middle",
) -> str:
    """Text whose middle line is at height y."""
    # Centred by a shift: not every viewer knows dominant-baseline.
    return (
        f'<text x="{x:g}" y="{y + 0.35 * size:g}" font-size="{size:g}" font-weight="{weight}" fill="{fill}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )
