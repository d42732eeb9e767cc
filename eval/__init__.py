"""Measuring models: `python -m eval`. Runs from a checkout; imports yi_vl only."""
