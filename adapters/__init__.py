"""The life of a LoRA adapter: names, the door, the store, the catalog, the caches, the rank pool, the batched product.

Knows nothing of HTTP, of scheduling or of FastAPI, and never imports `app`.
"""
