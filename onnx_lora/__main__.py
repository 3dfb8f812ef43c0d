"""`python -m onnx_lora` is the command `onnx-lora`."""

from onnx_lora.cli import main

if __name__ == "__main__":
    main()
