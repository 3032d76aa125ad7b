"""What a LoRA file says about its training: kohya's ``ss_…`` keys, which front ends show and sort by."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping

from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.write import PREDICTION_NAMES
from sdxl_cli.data.manifest import Manifest
from sdxl_cli.model.config import BASE, REFINER, ModelConfig
from sdxl_cli.training.config import UNetTrainConfig
from sdxl_cli.training.session import Share

MOST_TAGS = 1000
"""As many tags as are counted in the file, the most frequent first."""

_VERSIONS = {True: "sdxl_refiner_v1-0", False: "sdxl_base_v1-0"}


def training_notes(
    config: UNetTrainConfig, model: ModelConfig, base: ModelFiles, manifest: Manifest, share: Share
) -> dict[str, str]:
    """Everything that is known before the first step; :func:`step_notes` has the rest.

    Args:
        config: of the run.
        model: its sizes.
        base: the files that the LoRA changes.
        manifest: what it is trained on.
        share: how batches are dealt out to processes.
    """
    batches = config.loop.batches_per_step(share.began_with)
    loop, lora, optimizer = config.loop, config.lora, config.loop.optimizer
    rates = {"unet": optimizer.learning_rate, **optimizer.rates}
    texts = [rates.get(name, optimizer.learning_rate) for name in ("clip_l", "big_g")]
    arguments: dict[str, object] = {}
    if lora.conv_rank or "convolutions" in lora.targets:
        arguments["conv_dim"] = lora.conv_rank or lora.rank
        arguments["conv_alpha"] = lora.conv_alpha or arguments["conv_dim"]
    if lora.dora:
        arguments |= {"algo": "lora", "dora_wd": True, "wd_on_out": True}
    released = model.unet in (BASE.unet, REFINER.unet)
    values: dict[str, object] = {
        # kohya's own module has no DoRA; the LyCORIS one has, in this writing
        "ss_network_module": "lycoris.kohya" if lora.dora else "networks.lora",
        "ss_network_dim": lora.rank,
        "ss_network_alpha": lora.alpha or lora.rank,
        "ss_network_dropout": lora.dropout or None,
        "ss_network_args": json.dumps(arguments) if arguments else None,
        "ss_base_model_version": _VERSIONS[model.is_refiner] if released else "sdxl_other_size",
        "ss_v2": False,
        "ss_sd_model_name": base.paths[0].name,
        "ss_sd_model_hash": base.short_hash,
        "ss_new_sd_model_hash": base.sha256,
        "ss_learning_rate": optimizer.learning_rate,
        "ss_unet_lr": rates["unet"],
        "ss_text_encoder_lr": json.dumps(texts) if config.train_text_encoders else None,
        "ss_optimizer": optimizer.name,
        "ss_lr_scheduler": optimizer.schedule,
        "ss_lr_warmup_steps": optimizer.warmup_steps,
        "ss_max_grad_norm": optimizer.max_grad_norm,
        "ss_max_train_steps": loop.max_steps,
        "ss_total_batch_size": loop.batch_size * batches * share.began_with,
        "ss_gradient_accumulation_steps": batches,
        "ss_mixed_precision": loop.dtype,
        "ss_seed": loop.seed,
        "ss_clip_skip": None,
        "ss_noise_offset": config.noise_offset or None,
        "ss_min_snr_gamma": config.min_snr_gamma or None,
        "ss_zero_terminal_snr": config.zero_terminal_snr,
        "ss_debiased_estimation": config.debiased,
        "ss_caption_dropout_rate": config.text_dropout,
        "ss_training_started_at": time.time(),
        "modelspec.prediction_type": PREDICTION_NAMES[config.prediction],
    }
    return {name: str(value) for name, value in values.items()} | dataset_notes(manifest)


def dataset_notes(manifest: Manifest) -> dict[str, str]:
    """What a front end shows of the pictures: how many, of which sizes, and how often each tag was said."""
    rows = manifest.kept
    name = str(manifest.root).rstrip("/").rpartition("/")[2] or "pictures"
    tags: Counter[str] = Counter()
    for row in rows:
        tags.update({tag.strip() for caption in row.captions for tag in caption.split(",") if tag.strip()})
    sizes = Counter(row.plan.target_size for row in rows)
    buckets = {
        str(index): {"resolution": [width, height], "count": count}
        for index, ((height, width), count) in enumerate(sorted(sizes.items()))
    }
    return {
        "ss_num_train_images": str(sum(row.repeats for row in rows)),
        "ss_dataset_dirs": json.dumps({name: {"n_repeats": 1, "img_count": len(rows)}}),
        "ss_bucket_info": json.dumps({"buckets": buckets}),
        "ss_tag_frequency": json.dumps({name: dict(tags.most_common(MOST_TAGS))}),
        "ss_enable_bucket": str(len(sizes) > 1),
    }


def step_notes(step: int, epoch: int, name: str) -> Mapping[str, str]:
    """Where a file stands in its run: after so many steps and whole epochs, under this name."""
    return {
        "ss_steps": str(step),
        "ss_epoch": str(epoch),
        "ss_output_name": name,
        "ss_training_finished_at": str(time.time()),
    }
