//! Streamed second moments of the input of a Linear.
