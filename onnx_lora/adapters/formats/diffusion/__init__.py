"""The formats of image models: diffusers', kohya's with LyCORIS', cloneofsimo's."""
