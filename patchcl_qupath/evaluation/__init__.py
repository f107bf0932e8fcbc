"""Evaluation: scores of segmented nuclei against ground truth."""
