"""Retrieval over HTTP: a collection's snapshots behind a Ray Serve application."""
