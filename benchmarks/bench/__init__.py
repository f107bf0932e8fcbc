"""What `benchmarks/quality.py` is made of: labelled sets, measures, rows, a cache, tables."""
