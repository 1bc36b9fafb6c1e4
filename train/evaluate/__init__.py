"""How good the embedded model is, in numbers: judges trained apart from it, and the report they write."""
