"""llama.cpp's LoRA files."""
