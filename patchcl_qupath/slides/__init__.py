"""Slides: reading at the working resolution, tissue masks, stain vectors and normalisers."""
