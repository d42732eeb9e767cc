"""Images and samples per second of one core: the trainer's loader beside a webdataset pipeline.

Both read the same shards, made here: conversations about photographs of about a megapixel, every fourth about two. Both
end with normalized pixels and padded ids.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
import webdataset
from open_clip.transform import image_transform
from PIL import Image

import yi_vl
from yi_vl.chat import from_llava, render
from yi_vl.config import IMAGE_MEAN
from yi_vl.processor import YiVLProcessor

from ..attention.cpu import keep_memory
from ..config import DataConfig, SourceConfig
from ..data.batch import IGNORE
from ..data.fast_image import to_inputs
from ..data.loader import StepLoader

Format = Literal["jpg", "png"]
BATCH = 16
_SIZES = ((1152, 864), (864, 1152), (1224, 816), (1328, 747), (1000, 1000))  # about a megapixel each
_QUALITY, _GRAIN = 90, 3.0  # of JPEG; of a sensor, in levels of 255
_NUM_TINY_SHARDS, _TINY_SAMPLES = 10, 1000
_MAX_TOKENS = 4096


def processor_for(size_px: int) -> YiVLProcessor:
    """nano's processor with 14 px patches and another image size."""
    processor: YiVLProcessor = YiVLProcessor.from_pretrained(Path(yi_vl.__file__).parent / "nano")
    processor.image_processor.size_px, processor.patch_size = size_px, 14
    return processor


def make_shards(folder: Path, image_format: Format, num_samples: int) -> Path:
    """A shard of photographs with conversations, unless it exists already."""
    path = folder / f"{image_format}-{num_samples}.tar"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    unfinished = path.with_suffix(".unfinished")
    with webdataset.TarWriter(str(unfinished)) as tar:
        for index in range(num_samples):
            count = 2 if index % 4 == 3 else 1
            names = [image_format] if count == 1 else [f"{number}.{image_format}" for number in range(count)]
            members: dict[str, Any] = {name: _encoded(_photograph(rng), image_format) for name in names}
            members["json"] = json.dumps({"conversations": _conversation(rng, count)}).encode()
            tar.write({"__key__": f"{index:06d}", **members})
    unfinished.rename(path)
    return path


def compare(shard: Path, size_px: int, num_samples: int) -> dict[str, dict[str, float]]:
    """Rates of both loaders over the same samples, in CPU time; the first batch is not counted."""
    processor = processor_for(size_px)
    keep_memory()  # for both, as the trainer does on a CPU
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: _rates(load(shard, processor), num_samples) for name, load in LOADERS.items()}
    finally:
        torch.set_num_threads(threads)


def baseline(shard: Path, processor: YiVLProcessor) -> Iterator[dict[str, Any]]:
    """webdataset, Pillow and open_clip's transform, padding like Yi-VL's; padded batches."""
    mean_colour = tuple(int(255 * channel) for channel in IMAGE_MEAN)
    size_px = processor.image_processor.size_px
    transform = image_transform(size_px, is_train=False, resize_mode="longest", fill_color=mean_colour)  # type: ignore[arg-type]

    def encode(sample: dict[str, Any]) -> dict[str, Any]:
        messages = from_llava(sample["json"]["conversations"])
        encoded = processor.encode(render(messages, chat_format=processor.chat_format))
        images = [sample[name] for name in sorted(sample) if isinstance(sample[name], Image.Image)]
        ids, mask = torch.tensor(encoded.input_ids), torch.tensor(encoded.loss_mask)
        return {
            "input_ids": ids,
            "labels": torch.where(mask, ids, IGNORE),
            "pixel_values": torch.stack([transform(image) for image in images]),
        }

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad([sample["input_ids"] for sample in samples], batch_first=True),
            "labels": pad([sample["labels"] for sample in samples], batch_first=True, padding_value=IGNORE),
            "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
        }

    stream = webdataset.WebDataset(str(shard), shardshuffle=False).repeat().shuffle(BATCH).decode("pilrgb")
    return iter(stream.map(encode).batched(BATCH, collation_fn=collate))


def yi_vl_loader(shard: Path, processor: YiVLProcessor) -> Iterator[dict[str, Any]]:
    """The trainer's loader, its batches normalized as in the trainer."""
    for step in _loader([str(shard)], processor):
        for micro_batch in step.micro_batches:
            assert micro_batch.images is not None
            pixel_values = processor.image_processor.to_pixel_values(micro_batch.images)
            yield {"input_ids": micro_batch.input_ids, "labels": micro_batch.labels, "pixel_values": pixel_values}


LOADERS: dict[str, Callable[[Path, YiVLProcessor], Iterator[dict[str, Any]]]] = {
    "webdataset": baseline,
    "train.data.loader": yi_vl_loader,
}


def drift(shard: Path, size_px: int, num_images: int = 20) -> tuple[float, float]:
    """Mean and root mean square difference of the trainer's pixels to those of inference, of 255."""
    processor = processor_for(size_px).image_processor
    differences = []
    for sample in webdataset.WebDataset(str(shard), shardshuffle=False):
        for name in sample:
            if name.endswith(("jpg", "png")):
                exact = processor.to_uint8(sample[name]).float()
                (fast,) = to_inputs(sample[name], size_px)
                differences.append((fast.float() - exact).flatten())
        if len(differences) >= num_images:
            break
    all_differences = torch.cat(differences)
    return all_differences.abs().mean().item(), all_differences.pow(2).mean().sqrt().item()


def resident_memory(folder: Path, num_samples: int, num_rows: int = 10) -> Iterator[tuple[int, float]]:
    """Stream tiny samples, a few of them broken, repeatedly: samples so far, and resident megabytes."""
    shards = [str(_tiny_shard(folder, number)) for number in range(_NUM_TINY_SHARDS)]
    processor = processor_for(14)
    process, num_shown = psutil.Process(), 0
    for num_steps, _ in enumerate(_loader(shards, processor), start=1):
        done = num_steps * BATCH
        if done * num_rows >= (num_shown + 1) * num_samples:
            num_shown += 1
            yield done, process.memory_info().rss / 1e6
        if done >= num_samples:
            return


def _loader(shards: list[str], processor: YiVLProcessor) -> StepLoader:
    sources = [SourceConfig(name="photographs", shards="::".join(shards))]
    data = DataConfig(format="chat", sources=sources, workers=0, shuffle_buffer=BATCH)
    return StepLoader(processor, data, _MAX_TOKENS, 0, 0, 1, BATCH, BATCH)


def _rates(batches: Iterator[dict[str, Any]], num_samples: int) -> dict[str, float]:
    next(batches)
    num_images = num_done = 0
    started = time.process_time()
    while num_done < num_samples:
        batch = next(batches)
        num_images += len(batch["pixel_values"])
        num_done += len(batch["input_ids"])
    seconds = time.process_time() - started
    return {"images_per_second": num_images / seconds, "samples_per_second": num_done / seconds}


def _photograph(rng: np.random.Generator) -> Image.Image:
    """A part of one of scikit-learn's two photographs, enlarged, with grain."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ValueError("The photographs are scikit-learn's, which is missing: pip install -e '.[nano]'.") from error
    photographs = load_sample_images().images  # (427, 640, 3) uint8 each
    size = _SIZES[rng.integers(len(_SIZES))]
    whole = Image.fromarray(photographs[rng.integers(len(photographs))])
    scale = rng.uniform(0.6, 1) * min(whole.width / size[0], whole.height / size[1])
    width, height = size[0] * scale, size[1] * scale
    left, top = rng.uniform(0, whole.width - width), rng.uniform(0, whole.height - height)
    large = whole.resize(size, Image.Resampling.LANCZOS, box=(left, top, left + width, top + height))
    grain = rng.normal(0, _GRAIN, (size[1], size[0], 1))
    return Image.fromarray((np.asarray(large) + grain).clip(0, 255).astype(np.uint8))


def _encoded(image: Image.Image, image_format: Format) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_QUALITY) if image_format == "jpg" else image.save(file, "PNG")
    return file.getvalue()


def _conversation(rng: np.random.Generator, num_images: int) -> list[dict[str, str]]:
    """Up to five turns, with answers of up to sixty words."""
    turns = []
    for turn in range(int(rng.integers(1, 6))):
        question = ("<image>" * num_images + "\n" if turn == 0 else "") + "What is left of the small red thing?"
        answer = " ".join(["There is a large blue thing."] * int(rng.integers(1, 10)))
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return turns


def _tiny_shard(folder: Path, number: int) -> Path:
    path = folder / f"tiny-{number}.tar"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    content = _encoded(Image.new("RGB", (16, 12), (20 * number, 100, 200)), "png")
    conversation = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": f"It is {number}."}]
    text = json.dumps({"conversations": conversation}).encode()
    unfinished = path.with_suffix(".unfinished")
    with webdataset.TarWriter(str(unfinished)) as tar:
        for index in range(_TINY_SAMPLES):
            is_broken = index % 500 == 499
            tar.write({"__key__": f"{index:06d}", "png": content[:30] if is_broken else content, "json": text})
    unfinished.rename(path)
    return path
