"""The trainer: `python -m train CONFIG.yaml key.sub=value ...`. Imports yi_vl only, and nothing imports it."""
