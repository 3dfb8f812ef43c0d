"""The fuzzer: mutated files into every reader, and into export, attach, open, run and fold. `make fuzz` runs it.

`mutate.py` changes bytes, `seeds.py` writes the whole files, `targets.py` says what is done with them, `worker.py` does
it in a process that may die, `campaign.py` hands out the work and keeps what was found."""
