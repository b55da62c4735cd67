"""Small checkpoints that ship with the project, the code that made them and that judges them."""
