"""Corrections: which ROIs are worth one, and the samples that are made of corrected ROIs."""
