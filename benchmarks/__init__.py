"""What the project claims about speed and memory, as commands."""
