"""What `make demo` runs: a picture through a Qwen2.5-VL-shaped checkpoint, a long text through a trained model."""
