"""The HTTP interface: OpenAPI endpoints, streaming and input limits. It has no model, only a backend."""
