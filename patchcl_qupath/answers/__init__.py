"""From nuclei to answers: positive and negative nuclei, regions, TMA cores, and their summaries."""
