"""MixGRPO (arXiv 2507.21802): stochastic steps in a window that moves, Euler's everywhere else.

Source: the paper and its code for FLUX. Departures are those of `_window.py`.
"""

from __future__ import annotations

from ngrpo_lora.algorithms._window import WindowAlgorithm
from ngrpo_lora.config.algorithms.mix import Config


class Algorithm(WindowAlgorithm[Config]):
    """See `_base.Algorithm` for the contract."""
