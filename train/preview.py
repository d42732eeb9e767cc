"""What the model will see: `python -m train.preview CONFIG.yaml [key.sub=value ...] [--samples 12] [--out FILE]`.

One page without outside files: each image after the transform, the text with what is supervised coloured, token
counts, source, shard and key. A preference is shown with both answers.
"""

from __future__ import annotations

import argparse
from collections import Counter
from html import escape
from pathlib import Path

from yi_vl import program
from yi_vl.encode import Encoded
from yi_vl.processor import YiVLProcessor

from .config import TrainConfig
from .config_file import load_config
from .data.batch import Sample
from .data.encoder import SampleEncoder, TooLong, draw_turn
from .data.samples import sample_name
from .data.stream import Mixture
from .describe import describe_sources
from .html_page import html_page, image_tag
from .init import initial_processor
from .schedule import run_progress

_STYLE = """

.supervised { background: #c8ecd0; border-radius: 3px; }
.image { background: #d8e4fb; border-radius: 3px; color: #335; }
small { margin-bottom: .6em; }
article.skipped { border-color: #d99; background: #fff6f5; }
"""


def preview(config: TrainConfig, num_samples: int) -> str:
    """The HTML page of the first samples of the run's first stream, in their order.

    Weights that change go from their start to their end on the page, as if it were the whole run.

    Raises:
        ValueError: there is no data, or no model whose tokenizer and image size to show it with.
    """
    processor = initial_processor(config)
    encoder = SampleEncoder(processor, config.data, config.max_tokens)
    documents = encoder.new_documents()
    mixture = Mixture(config.data.sources, config.data.shuffle_buffer, config.seed)
    articles: list[str] = []
    counts: Counter[str] = Counter()
    while len(articles) < num_samples:
        progress = run_progress(len(articles), num_samples)
        for source, raw, outcome in draw_turn(mixture, encoder, documents, progress):
            name = config.data.sources[source].name
            if isinstance(outcome, Sample):
                counts[name] += 1
                articles.append(_article(name, outcome, processor.tokenizer, processor.image_token_id))
            elif isinstance(outcome, ValueError) and raw is not None:
                counts["too long" if isinstance(outcome, TooLong) else "broken"] += 1
                label, reason = escape(f"{name} · {sample_name(raw)}"), escape(str(outcome))
                articles.append(f"<article class=skipped><div><small>{label}</small>skipped: {reason}</div></article>")
    summary = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    changes = f"<p>{escape(line)}.</p>" if (line := describe_sources(config)) is not None else ""
    body = (
        f"<h1>{escape(config.run_dir)}</h1>"
        f"<p>{config.image_size} px, {processor.tokens_per_image} tokens per image{_describe_tiles(processor)}. "
        f"<span class=supervised>Supervised</span>, <span class=image>image</span>. {escape(summary)}.</p>{changes}"
        + "\n".join(articles)
    )
    return html_page(config.run_dir, body, _STYLE)


def _article(source: str, sample: Sample, tokenizer: object, image_token_id: int) -> str:
    rows = sample.rows
    tokens = ", ".join(f"{len(row.input_ids)} tokens, {sum(row.loss_mask)} supervised" for row in rows)
    images = "".join(map(image_tag, sample.images))
    headings = ["chosen: ", "rejected: "] if len(rows) == 2 else [""]
    texts = "".join(
        f"<p>{heading and f'<b>{heading}</b>'}{_coloured(row, tokenizer, image_token_id)}</p>"
        for heading, row in zip(headings, rows)
    )
    return (
        f"<article><div>{images}</div><div><small>{escape(source)} · {escape(sample.name)} · {tokens}, "
        f"{_describe_images(sample)}</small>{texts}</div></article>"
    )


def _describe_tiles(processor: YiVLProcessor) -> str:
    max_tiles = processor.image_processor.max_tiles
    return f", and as many for each of at most {max_tiles} tiles" if max_tiles else ""


def _describe_images(sample: Sample) -> str:
    num_images = sum(segment.is_image for segment in sample.segments)
    num_tiles = len(sample.images) - num_images
    return f"{num_images} images" + (f", {num_tiles} tiles" if num_tiles else "")


def _coloured(row: Encoded, tokenizer: object, image_token_id: int) -> str:
    """The text decoded from the very ids that are trained on, run by run of equal colour."""
    pieces: list[str] = []
    run: list[int] = []
    colour = ""

    def close() -> None:
        if colour == "image":
            pieces.append(f"<span class=image>[image: {len(run)} tokens]</span>")
        elif run:
            text = escape(tokenizer.decode(run))  # type: ignore[attr-defined]
            text = text.replace("\n", "⏎\n") if colour else text  # a supervised line break would be invisible
            pieces.append(f"<span class={colour}>{text}</span>" if colour else text)
        run.clear()

    starts = set(row.image_starts)
    for index, (token, is_supervised) in enumerate(zip(row.input_ids, row.loss_mask)):
        new = "image" if token == image_token_id else "supervised" if is_supervised else ""
        if new != colour or index in starts:
            close()
            colour = new
        run.append(token)
    close()
    return "".join(pieces)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m train.preview", description="Look at what the model will see.")
    parser.add_argument("config", help="a YAML file of train/configs")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace the file's")
    parser.add_argument("--samples", type=int, default=12, help="number of samples (default 12)")
    parser.add_argument(
        "--out", type=Path, default=Path("preview.html"), help="the page to write (default preview.html)"
    )
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    arguments.out.write_text(preview(config, arguments.samples), encoding="utf-8")
    print(f"{arguments.out}: {arguments.samples} samples of {config.run_dir}")


if __name__ == "__main__":
    program.run(main, "error")
