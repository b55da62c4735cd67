"""Batch work: what a job is, what became of it, who works on it."""
