"""From a manifest to a packed dataset: fetch, render, pack, open."""
