"""Corrections: which regions are worth one, and what was corrected."""
