"""What the server offers of retrieval: embeddings, reranking, search and documents of indexes."""
