"""The small world that models/toyworld was trained on."""
