"""Late-interaction search with LFM2-ColBERT: holds the place, nothing is registered yet."""
