"""The index: immutable segments on disk, searched by late interaction; `Index` is its face."""
