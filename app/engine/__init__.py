"""Token ids in, token ids out. Knows nothing of HTTP, of text or of stores."""
