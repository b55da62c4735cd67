"""The parser of the scripts' command lines. `utils` has the arguments."""
