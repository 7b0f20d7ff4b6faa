"""Let people give feedback in a browser: the ranking page, the playground, and rounds of both."""
