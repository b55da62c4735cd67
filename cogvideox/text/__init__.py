"""Encoding of prompts."""
