"""Slides: opened, read at the working resolution, their tissue and stains found."""
