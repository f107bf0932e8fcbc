"""Networks, what runs them, and trained models on disk."""
