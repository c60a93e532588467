"""What an adapter is: targets, deltas, callbacks, the catalogue, storage. Imports nothing else of graft."""
