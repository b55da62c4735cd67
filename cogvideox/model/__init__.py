"""The model's folder, configuration and settings."""
