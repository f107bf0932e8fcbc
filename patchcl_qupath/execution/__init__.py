"""Tiles on workers: Dask clusters, job queues, finished tiles on disk."""
