"""The browser demo: a Gradio page on top of any client from `serving.clients`."""
