"""Export of a run as CSV files or as TensorBoard event files."""

from geodiag.export.run_export import export

__all__ = ["export"]
