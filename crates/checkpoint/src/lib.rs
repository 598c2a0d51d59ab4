//! Checkpoint folders on disk: safetensors, Hugging Face config, compressed-tensors, PEFT adapters.
