"""The HTTP server: OpenAI's API, what is refused, deadlines, requests to the engine and their answers."""
