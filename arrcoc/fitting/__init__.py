"""Fits the texture head to a checkpoint: from boxes, or by distilling the glimpse (`arrcoc fit`)."""

from arrcoc.fitting.rows import Row, read_rows
from arrcoc.fitting.run import FitResult, fit
from arrcoc.fitting.settings import FitSettings

__all__ = ["FitResult", "FitSettings", "Row", "fit", "read_rows"]
