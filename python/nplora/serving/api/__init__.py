"""The HTTP interface of the server: OpenAI's API, and some routes of vLLM and llama.cpp."""
