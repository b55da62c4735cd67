"""Batches: job files, records of jobs, and claims by processes."""
