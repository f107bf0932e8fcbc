"""Files: atomic writes, paths, JSON records, nuclei as parquet, areas from GeoJSON."""
