//! Decoder families as data, one forward pass over a Backend, KV cache, sampling, perplexity.
