"""Spike detection: one float in, one verdict out."""


class SpikeDetector: ...
