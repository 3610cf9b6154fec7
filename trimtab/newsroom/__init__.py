"""The embedded world that the quickstart trains in: articles, writers, annotators and a gold score."""
