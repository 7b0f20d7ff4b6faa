"""Let people talk to the policies in a browser, or with any client of OpenAI's interface."""
