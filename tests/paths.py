"""Where the checkout and its recorded sample runs are, for tests in any folder."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "sample_runs"
