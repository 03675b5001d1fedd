"""A search service over a store: a page and a JSON API on the loopback interface, on FastAPI and uvicorn."""
