"""What several stages read and write in the same way."""
