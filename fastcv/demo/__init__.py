"""Two detection pipelines on a photograph, as they are and patched: ``python -m fastcv.demo``."""
