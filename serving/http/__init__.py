"""The HTTP interface: OpenAPI endpoints, streaming and input limits. It holds no model, only a client."""
