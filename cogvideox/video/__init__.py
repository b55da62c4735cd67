"""Video files and contact sheets."""
