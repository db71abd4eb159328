"""The paper's own figures (arXiv 2511.16955): FLUX.1-dev on 32 NVIDIA H800, 16 for Tables 4 to 6."""

from __future__ import annotations

__all__ = ["COLUMNS", "FIGURES", "NOTE"]

NOTE = "Columns with (paper) are the paper's own figures, of FLUX.1-dev on H800 GPUs and of other rewards."

COLUMNS: dict[int, tuple[str, ...]] = {
    1: ("s/iter.", "HPSv2.1", "Unified.", "Aes."),
    2: ("HPSv2.1", "CLIP", "Unified.", "Aes."),
    3: ("NFE_old", "NFE_θ", "s/iter."),
    4: ("HPSv2.1", "CLIP", "Unified.", "Aes."),
    5: ("HPSv2.1", "CLIP", "Unified.", "Aes."),
    6: ("HPSv2.1", "CLIP", "Unified.", "Aes."),
    7: (),
    8: (),
}
"""Columns by table; HPSv2.1 was trained on, in Table 1 with two others, and the rest only measured."""

_CENTRE = (0.379, 0.368, 3.132, 6.503)

FIGURES: dict[int, dict[str, tuple[float | None, ...]]] = {
    1: {
        "base": (None, 0.310, 3.211, 6.108),
        "dance": (237.86, 0.371, 3.156, 6.552),
        "mix": (237.71, 0.366, 3.257, 6.623),
        "mix-flash-frozen": (129.36, 0.343, 3.148, 6.770),
        "neighbor-ddim-25": (141.93, 0.359, 3.262, 6.669),
        "neighbor-dpmpp-16": (105.85, 0.369, 3.324, 6.633),
        "neighbor-dpmpp-8": (45.08, 0.366, 3.334, 6.621),
    },
    2: {
        "vivid-dance": (0.356, 0.366, 3.114, 6.400),
        "vivid-mix": (0.371, 0.367, 3.125, 6.365),
        "vivid-branch": (0.379, 0.362, 3.138, 6.571),
        "vivid-p-2": _CENTRE,
        "vivid-p-0.8": (0.372, 0.371, 3.166, 6.626),
    },
    3: {
        "dance": (25, 14.00, 237.86),
        "mix": (25, 14.00, 237.71),
        "mix-flash-frozen": (8, 4.00, 129.36),
        "branch": (20, 13.68, 249.33),
        "neighbor-ddim-25": (25, 4.00, 141.93),
        "neighbor-dpmpp-16": (16, 3.00, 105.85),
        "neighbor-dpmpp-8": (8, 1.33, 45.08),
    },
    4: {
        "radius-1.0": (0.364, 0.359, 3.046, 6.362),
        "ablation-centre": _CENTRE,
        "neighbor-dpmpp-8": (0.375, 0.363, 3.141, 6.639),
        "radius-0.1": (0.357, 0.364, 3.122, 6.295),
    },
    5: {
        "anchors-2": (0.370, 0.363, 3.081, 6.319),
        "ablation-centre": _CENTRE,
        "anchors-8": (0.374, 0.373, 3.187, 6.403),
        "anchors-12": (0.377, 0.370, 3.185, 6.328),
    },
    6: {
        "ablation-centre": _CENTRE,
        "p-1": (0.377, 0.356, 3.126, 6.508),
        "p-0.8": (0.372, 0.371, 3.166, 6.626),
        "p-0.5": (0.372, 0.354, 3.104, 6.548),
    },
    7: {},
    8: {},
}
"""Figures by table and by the name of the method here; a method without an entry is not in that table of the paper."""
