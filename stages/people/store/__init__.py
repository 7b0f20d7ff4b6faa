"""Keep what people say in one SQLite file."""
