"""The other side of each benchmark. These modules run inside the peer's own environment."""
