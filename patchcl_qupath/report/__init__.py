"""The report: an HTML page, its charts and figures."""
