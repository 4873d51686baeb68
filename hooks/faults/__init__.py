"""`geodiag.faults`: faults planted in a running training, to test what geodiag finds."""

from geodiag.hooks.faults.catalogue import page
from geodiag.hooks.faults.injector import Faults, plant
from geodiag.hooks.faults.spec import FORM, KINDS, LASTING, Fault, Kind

__all__ = ["FORM", "KINDS", "LASTING", "Fault", "Faults", "Kind", "page", "plant"]
