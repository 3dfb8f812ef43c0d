"""Folders of adapters, converted in one go, which a second run goes on with."""
