"""Spike detection: one loss in, one verdict out, and the spikes of a whole curve."""

from geodiag.spikes.detector import SpikeDetector, Verdict
from geodiag.spikes.event import Spike

__all__ = ["Spike", "SpikeDetector", "Verdict"]
