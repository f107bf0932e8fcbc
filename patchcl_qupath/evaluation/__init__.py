"""How well nuclei agree with outlines that people made."""
