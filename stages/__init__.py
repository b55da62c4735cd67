"""What the stage scripts do, as a library."""
