"""Draw docs/architecture.svg: from a dense weight to a saved structure.

python docs/make_architecture.py
"""

from pathlib import Path

# What is done, in which folder, and what it hands on.
STEPS = (
    ("settle", "compression", "options in parts"),
    ("prepare", "compression, hosts, statistics", "matrices and evidence"),
    ("plan", "methods, planning", "the plan: structure and sizes"),
    ("solve", "methods", "numbers, group by group"),
    ("fill", "compression, remote_code", "structures in their places"),
    ("refine", "compression", "factors nearer to the dense model"),
    ("store", "compression, sharing", "a folder that loads anywhere"),
)
WIDTH, BOX, HEIGHT, GAP = 760, 250, 44, 26
COLORS = ("#eaf1fb", "#2f5d9b", "#444444")


def box(place: int, name: str, folder: str) -> str:
    """One step: its name, and below it the folder it lives in."""
    top = 40 + place * (HEIGHT + GAP)
    return (
        f'<rect x="40" y="{top}" width="{BOX}" height="{HEIGHT}" rx="6" fill="{COLORS[0]}" stroke="{COLORS[1]}"/>'
        f'<text x="56" y="{top + 19}" font-weight="bold" fill="{COLORS[1]}">{place + 1}. {name}</text>'
        f'<text x="56" y="{top + 36}" font-size="12" fill="{COLORS[2]}">{folder}</text>'
    )


def arrow(place: int, carried: str) -> str:
    """From a step down, with what it carries beside it."""
    top = 40 + place * (HEIGHT + GAP) + HEIGHT
    line = f'<line x1="165" y1="{top}" x2="165" y2="{top + GAP - 3}" stroke="{COLORS[1]}" marker-end="url(#tip)"/>'
    return f'{line}<text x="{BOX + 60}" y="{top + 17}" font-size="13" fill="{COLORS[2]}">{carried}</text>'


def picture() -> str:
    """The drawing."""
    height = 40 + len(STEPS) * (HEIGHT + GAP) + 20
    view = f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="15"'
    tip = f'<path d="M0,0 L6,3 L0,6 z" fill="{COLORS[1]}"/>'
    marker = 'id="tip" markerWidth="8" markerHeight="8" refX="5" refY="3" orient="auto"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {view}>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f"<defs><marker {marker}>{tip}</marker></defs>",
        f'<text x="40" y="26" fill="{COLORS[2]}">a dense model, a budget, perhaps a text</text>',
    ]
    for place, (name, folder, carried) in enumerate(STEPS):
        parts += [box(place, name, folder), arrow(place, carried)]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    target = Path(__file__).with_name("architecture.svg")
    target.write_text(picture(), encoding="utf-8")
    print(f"wrote {target.name}")
