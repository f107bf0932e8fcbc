"""Label-free nucleus segmentation of the whole-slide images of a QuPath project."""

__version__ = "0.1.0"
