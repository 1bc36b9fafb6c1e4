"""The Ray Serve application, `serve run serving:app`. Importing this package loads neither ray nor torch."""


def __getattr__(name: str):
    # Imported on first use, so that web pages and scripts that only use `serving.clients` do not import ray and torch.
    if name == "app":
        from .build import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
