"""Files: there whole or not at all; nuclei as parquet; areas as GeoJSON."""
