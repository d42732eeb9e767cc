"""A chat about images in the browser: `python -m demo`. Runs from a checkout; imports yi_vl only."""
