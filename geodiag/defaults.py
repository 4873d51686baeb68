"""Defaults and limits shared by the Python interface and the command line; light to import."""

PROBE_EVERY = 10
"""Steps between probes. The cadence of slower probes is a multiple of it, and keeps that ratio."""

DELAY_STEPS = 8
"""Δ of anticipatory routing and of router lag, in steps."""

MAX_DELAY_STEPS = 64
"""Largest Δ: each step of delay keeps one batch and its expert ids in memory."""

SNAPSHOT_EVERY = 50
"""Steps between snapshots."""
