"""`python -m train CONFIG.yaml key.sub=value ...`; on many GPUs `accelerate launch -m train CONFIG.yaml ...`."""

from __future__ import annotations

import argparse
import logging
import os

from yi_vl import program

from .config_file import load_config


def main() -> None:
    """Train by a config file."""
    parser = argparse.ArgumentParser(
        prog="python -m train", description="Train a Yi-VL; see train/configs for recipes."
    )
    parser.add_argument("config", help="a YAML file, such as train/configs/nano/align-224.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the file's")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from transformers.utils import logging as transformers_logging

    from .trainer import train  # torch and transformers, after the settings are known to be right

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    train(config)


if __name__ == "__main__":
    program.run(main, "error")
