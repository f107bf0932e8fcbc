"""Tables of nuclei, images, regions and TMA cores, and files for other programs."""
