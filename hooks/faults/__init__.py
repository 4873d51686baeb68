"""Faults that are planted on purpose, to test what geodiag finds."""
