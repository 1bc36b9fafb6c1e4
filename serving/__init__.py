"""The Ray Serve application, `serve run serving:app`. Importing this package loads neither ray nor torch."""


def __getattr__(name: str):
    # Lazily, so that `serving.clients` stays light for web pages and scripts that only talk to a server.
    if name == "app":
        from .build import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
