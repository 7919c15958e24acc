"""Write the drawings of the documentation, docs/drawings/*.svg: python scripts/drawings.py.

Each is 560 wide, to be read on a phone, stands on a ground of its own and follows the reader's light or dark.
Grey is the base, which is frozen; orange is what is trained; green is what was made of both.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "docs" / "drawings"
WIDTH = 560

STYLE = """\
:root { --ground: #fbfcfd; --edge: #d5dbe2; --ink: #1d2733; --soft: #5c6875;
  --base: #e4e9ef; --base-edge: #8593a3; --new: #ffe3c2; --new-edge: #d9730d;
  --made: #d3efdc; --made-edge: #2f8f57 }
@media (prefers-color-scheme: dark) { :root { --ground: #171c22; --edge: #39424d; --ink: #e4e9ef;
  --soft: #9aa7b4; --base: #2d3742; --base-edge: #8593a3; --new: #553410; --new-edge: #f0953f;
  --made: #1b4430; --made-edge: #5cc389 } }
text { font: 15px system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif; fill: var(--ink) }
.soft { fill: var(--soft); font-size: 13px }
.strong { font-weight: 600 }
.code { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace }
.small { font-size: 12.5px }
.mid { text-anchor: middle } .end { text-anchor: end }
.ground { fill: var(--ground); stroke: var(--edge) }
.base { fill: var(--base); stroke: var(--base-edge) }
.new { fill: var(--new); stroke: var(--new-edge) }
.made { fill: var(--made); stroke: var(--made-edge) }
.hull { fill: none; stroke: var(--new-edge); stroke-dasharray: 5 4 }
.rule { stroke: var(--edge) }
.line { fill: none; stroke: var(--ink); stroke-width: 1.4 }
.head { marker-end: url(#head) }
.both { marker-start: url(#tail); marker-end: url(#head) }
.dash { stroke: var(--soft); stroke-dasharray: 4 4 }
.tip { fill: var(--ink) }"""

MARKERS = """\
<defs>
<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">\
<path d="M0 0 8 4 0 8z" class="tip"/></marker>
<marker id="tail" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="7" markerHeight="7" orient="auto">\
<path d="M8 0 0 4 8 8z" class="tip"/></marker>
</defs>"""


class Drawing:
    """Shapes, from the back to the front."""

    def __init__(self, title: str, told: str, height: int) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(told)}</desc>",
            f"<style>{STYLE}</style>",
            MARKERS,
            f'<rect class="ground" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        ]

    def text(self, x: float, y: float, text: str, style: str = "") -> None:
        self.parts.append(f'<text class="{style}" x="{x:g}" y="{y:g}">{escape(text)}</text>')

    def heading(self, y: float, name: str, more: str) -> None:
        self.parts.append(
            f'<text x="24" y="{y:g}"><tspan class="strong">{escape(name)}</tspan>'
            f'<tspan class="soft" dx="10">{escape(more)}</tspan></text>'
        )

    def box(self, x: float, y: float, w: float, h: float, kind: str, *lines: str, style: str = "") -> None:
        """Draw a box with its lines of text in the middle, the first in `style`, the others softly."""
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="5"/>')
        first = y + h / 2 + 5 - 9 * (len(lines) - 1)
        for i, line in enumerate(lines):
            self.text(x + w / 2, first + 18 * i, line, f"mid {style if i == 0 else 'soft'}")

    def funnel(self, x: float, y: float, w: float, h: float, left: float, right: float, text: str) -> None:
        """Draw a trained matrix: from a side of height `left` to one of height `right`, both <= h."""
        middle = y + h / 2
        corners = [(x, -left / 2), (x + w, -right / 2), (x + w, right / 2), (x, left / 2)]
        points = " ".join(f"{px:g},{middle + dy:g}" for px, dy in corners)
        self.parts.append(f'<polygon class="new" points="{points}"/>')
        self.text(x + w / 2, middle + 5, text, "mid strong")

    def line(self, path: str, style: str = "head") -> None:
        self.parts.append(f'<path class="line {style}" d="{path}"/>')

    def plus(self, x: float, y: float) -> None:
        self.parts.append(f'<circle class="made" cx="{x:g}" cy="{y:g}" r="11"/>')
        self.line(f"M{x - 5:g} {y:g}h10M{x:g} {y - 5:g}v10", "")

    def rule(self, y: float) -> None:
        self.parts.append(f'<path class="rule" d="M24 {y:g}H{WIDTH - 24}"/>')

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>\n"])


def site() -> Drawing:
    d = Drawing(
        "A site and its wrapper",
        "Before: attention.self.query is a linear layer. After inject it is a LoRALinear, which owns lora_A, "
        "lora_B and, as its base, the very linear layer that was there.",
        350,
    )
    d.text(24, 34, "before", "soft")
    d.text(24, 64, "attention.self.query", "code")
    d.box(24, 80, 160, 56, "base", "Linear", "W, b")
    d.text(280, 34, "after", "soft")
    d.text(280, 64, "attention.self.query", "code")
    d.box(280, 80, 256, 212, "hull")
    d.text(296, 106, "LoRALinear", "strong")
    d.box(296, 122, 106, 52, "new", "lora_A", "(r, in)", style="code")
    d.box(414, 122, 106, 52, "new", "lora_B", "(out, r)", style="code")
    d.text(296, 202, "trained and saved", "soft")
    d.box(296, 218, 140, 56, "base", ".base: Linear", "W, b")
    d.text(448, 242, "frozen,", "soft")
    d.text(448, 260, "not copied", "soft")
    d.line("M188 100H274")
    d.text(231, 92, "inject", "mid code small")
    d.line("M274 126H190")
    d.text(231, 145, "eject", "mid code small")
    d.line("M104 140V246H290", "dash")
    d.text(116, 238, "the very same object", "soft")
    d.text(24, 326, "No other module of the model is touched, and W is never written to.", "soft")
    return d


def methods() -> Drawing:
    d = Drawing(
        "LoRA and the bottleneck adapter",
        "LoRA: y is x through the frozen W plus x through A, down to r, and B, up again, times s. "
        "The bottleneck: behind a frozen module, down to m, an activation and up, beside a way around it.",
        430,
    )
    d.heading(34, "LoRA", "beside a weight")
    d.text(24, 108, "x")
    d.line("M40 103H168")
    d.box(172, 66, 190, 74, "base", "W, b", "(out, in), frozen", style="strong")
    d.line("M362 103H449")
    d.plus(464, 103)
    d.line("M475 103H514")
    d.text(522, 108, "y")
    d.line("M84 103V184H126")
    d.funnel(130, 154, 72, 60, 60, 22, "A")
    d.line("M202 184H250")
    d.text(226, 176, "r", "mid soft")
    d.funnel(254, 154, 72, 60, 22, 60, "B")
    d.line("M326 184H368")
    d.box(372, 169, 40, 30, "new", "· s")
    d.line("M412 184H464V118")
    d.text(24, 236, "B begins at zero, so y begins as the base's own.", "soft")
    d.rule(252)
    d.heading(280, "Bottleneck", "behind a module, or beside it")
    d.text(24, 340, "x")
    d.line("M40 335H62")
    d.box(66, 306, 92, 58, "base", "module", "frozen")
    d.line("M158 335H198")
    d.funnel(202, 305, 62, 60, 60, 22, "down")
    d.line("M264 335H286")
    d.text(275, 327, "m", "mid soft")
    d.box(290, 318, 62, 34, "new", "GELU")
    d.line("M352 335H374")
    d.funnel(378, 305, 62, 60, 22, 60, "up")
    d.line("M440 335H453")
    d.plus(468, 335)
    d.line("M479 335H514")
    d.text(522, 340, "y")
    d.line("M180 335V390H468V350")
    d.text(202, 384, "the way around", "soft")
    d.text(24, 414, "It is not linear, so it cannot be merged.", "soft")
    return d


def forms() -> Drawing:
    d = Drawing(
        "Two ways to compute one formula",
        "Weight form: W plus s B A is formed, then x goes through it. Delta form: x goes through W and "
        "through A and B, and the outputs are added.",
        430,
    )
    d.heading(34, "Weight form", "for many tokens")
    d.box(24, 56, 74, 60, "base", "W", style="strong")
    d.text(119, 91, "+ s ·", "mid")
    d.box(142, 56, 22, 60, "new", "B", style="strong")
    d.box(172, 75, 74, 22, "new", "A", style="strong")
    d.line("M254 86H302")
    d.box(306, 56, 88, 60, "made", "W_eff", style="strong")
    d.line("M350 150V120")
    d.text(330, 166, "x", "")
    d.line("M350 150V162", "")
    d.line("M394 86H514")
    d.text(522, 91, "y")
    d.text(400, 78, "x W_effᵀ + b", "soft")
    d.text(24, 148, "Built anew, forward and backward:", "soft")
    d.text(24, 166, "(out, in), however many tokens.", "soft")
    d.rule(190)
    d.heading(224, "Delta form", "everywhere else")
    d.text(24, 278, "x")
    d.line("M40 273H150")
    d.box(154, 243, 96, 60, "base", "W, b", style="strong")
    d.line("M250 273H435")
    d.plus(450, 273)
    d.line("M461 273H514")
    d.text(522, 278, "y")
    d.text(262, 265, "x Wᵀ + b", "soft")
    d.line("M84 273V348H126")
    d.funnel(130, 318, 62, 60, 60, 22, "A")
    d.line("M192 348H230")
    d.funnel(234, 318, 62, 60, 22, 60, "B")
    d.line("M296 348H450V288")
    d.text(308, 340, "s (x Aᵀ) Bᵀ", "soft")
    d.text(24, 408, "Few tokens; dropout; 16-bit or quantised weights; torch.compile.", "soft")
    return d


def life() -> Drawing:
    d = Drawing(
        "The life of an adapter",
        "inject turns a base model into one with new parameters, which are trained, and eject gives the base "
        "back. save writes what was trained to a file, load brings it into a fresh base. merge and unmerge "
        "go both ways; fuse makes plain layers for serving.",
        432,
    )
    d.box(24, 40, 150, 62, "base", "base model", "yours, frozen", style="strong")
    d.box(310, 40, 226, 96, "hull")
    d.box(326, 57, 92, 62, "base", "base", "frozen")
    d.box(428, 57, 92, 62, "new", "A, B", "heads")
    d.line("M174 60H304")
    d.text(240, 52, "inject", "mid code")
    d.line("M304 86H180")
    d.text(240, 105, "eject", "mid code")
    d.line("M450 40C450 8 498 8 498 36")
    d.text(442, 26, "train", "end code")
    d.line("M310 122H254V241H210")
    d.text(246, 176, "fuse", "end code")
    d.box(24, 210, 182, 62, "made", "plain model", "W_eff in W's place", style="strong")
    d.line("M352 136V204")
    d.text(344, 176, "save", "end code")
    d.line("M384 210V142")
    d.text(394, 170, "load", "code")
    d.text(394, 188, "into a fresh base", "soft")
    d.box(290, 210, 190, 62, "new", "adapter.safetensors", "or a folder for PEFT", style="code")
    d.line("M516 136V316", "both")
    d.text(506, 292, "merge", "end code")
    d.text(506, 308, "unmerge", "end code")
    d.box(310, 322, 226, 62, "made", "merged model", "W_eff computes, W waits", style="strong")
    d.text(24, 322, "eject and unmerge give back every bit.", "soft")
    d.text(24, 344, "fuse is for good: no wrapper is left,", "soft")
    d.text(24, 362, "and the model is served as any other.", "soft")
    d.text(24, 410, "What is written is what was trained: factors and heads, never the base.", "soft")
    return d


DRAWINGS = {"site": site, "methods": methods, "forms": forms, "life": life}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
