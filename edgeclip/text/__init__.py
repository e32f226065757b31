"""Texts: tokens, the text encoder and the cache of label embeddings."""
