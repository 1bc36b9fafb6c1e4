"""The browser demo: a Gradio page over any client of `serving.clients`."""
