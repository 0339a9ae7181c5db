"""One file, one connector. See vlmzoo/connector.py for the contract."""
