"""One module per method: a trunk and a head that obey the graph contract."""
