"""What a layer of PEFT's LoRA can be beside a plain pair of factors, by options of LoRA's config; `../lora.py` asks."""
