"""The flags that ``generate`` and ``refine`` share, and what becomes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import typer

PROMPT, MODEL, STEPS, GUIDANCE, CONDITIONS, MACHINE, OUTPUT = (
    "Prompt",
    "Model",
    "How it steps",
    "Guidance",
    "What the model is told",
    "Where it runs",
    "Output and configuration",
)

PromptTwo = Annotated[
    str | None, typer.Option("--prompt-2", help="Another prompt for the bigG text encoder.", metavar="TEXT")
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(
        "--negative-prompt", "--neg", "-n", help="What should not be in the picture.", metavar="TEXT"
    ),
]
PromptSyntax = Annotated[
    str | None,
    typer.Option(help="How brackets are read: a1111, comfy or raw.", metavar="NAME", rich_help_panel=PROMPT),
]
Emphasis = Annotated[
    str | None,
    typer.Option(
        help="A1111's (word:1.3): original, or no-norm, which keeps the strength of the rest as it is.",
        metavar="NAME",
        rich_help_panel=PROMPT,
    ),
]
ClipSkip = Annotated[
    int | None,
    typer.Option(
        help="Layer of the text encoders, from the end: 2 is SDXL's own, 1 the last.",
        metavar="N",
        rich_help_panel=PROMPT,
    ),
]
StrictTokens = Annotated[
    bool | None,
    typer.Option(
        "--strict-tokens",
        help="Refuse prompts of more than 75 tokens instead of reading them in chunks.",
        metavar="",
        rich_help_panel=PROMPT,
    ),
]
Embedding = Annotated[
    list[str] | None,
    typer.Option(
        help="Textual inversion for SDXL, called by its file's name or by NAME in the prompt; may be repeated.",
        metavar="FILE[:NAME]",
        rich_help_panel=PROMPT,
    ),
]
EmbeddingsDir = Annotated[
    str | None,
    typer.Option(help="A folder of textual inversions.", metavar="FOLDER", rich_help_panel=PROMPT),
]
NegativePromptTwo = Annotated[
    str | None,
    typer.Option(
        "--negative-prompt-2",
        help="Another negative prompt for the bigG text encoder.",
        metavar="TEXT",
        rich_help_panel=GUIDANCE,
    ),
]
EmptyNegative = Annotated[
    str | None,
    typer.Option(
        help="Without a negative prompt: zeros, or encode the empty text.",
        metavar="zeros|encode",
        rich_help_panel=GUIDANCE,
    ),
]
CfgRescale = Annotated[
    float | None,
    typer.Option(
        "--cfg-rescale",
        "--guidance-rescale",
        help="Take back this share of the contrast guidance adds, 0 to 1; 0.7 is usual for v models.",
        metavar="X",
        rich_help_panel=GUIDANCE,
    ),
]
CfgInterval = Annotated[
    str | None,
    typer.Option(
        help="Guide only there: shares of the noise levels, 0 for none, such as 0.2:0.8; or sigma=0.28:5.42.",
        metavar="LO:HI",
        rich_help_panel=GUIDANCE,
    ),
]
CfgSchedule = Annotated[
    str | None,
    typer.Option(
        help="constant, linear or cosine (down to 1), linear-up, cosine-up, or scales such as 7,5,3.",
        metavar="NAME",
        rich_help_panel=GUIDANCE,
    ),
]
AdmScale = Annotated[
    str | None,
    typer.Option(
        help="Original sizes told at first, times these: POSITIVE:NEGATIVE:SHARE such as 1.5:0.8:0.3.",
        metavar="P:N:X",
        rich_help_panel=GUIDANCE,
    ),
]
Prediction = Annotated[
    str | None,
    typer.Option(
        help="What the model predicts: auto (what its file says), eps, v or x0.",
        metavar="NAME",
        rich_help_panel=MODEL,
    ),
]
ZeroTerminalSnr = Annotated[
    bool | None,
    typer.Option(
        "--zero-terminal-snr/--no-zero-terminal-snr",
        help="Whether the model was trained down to pure noise; default: what its file says.",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
Vae = Annotated[
    str | None,
    typer.Option(help="Another autoencoder: file or folder.", metavar="FILE", rich_help_panel=MODEL),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        "--network-weights",
        help="A LoRA: file or name, its scale, its scale in the text encoders; may be repeated.",
        metavar="FILE[:X[:X]]",
        rich_help_panel=MODEL,
    ),
]
LoraDir = Annotated[
    str | None,
    typer.Option(
        "--lora-dir",
        help="Where LoRAs are looked for by name, as in <lora:name:0.8>; default: loras/.",
        metavar="FOLDER",
        envvar="SDXL_LORA_DIR",
        show_envvar=False,
        rich_help_panel=MODEL,
    ),
]
Steps = Annotated[
    int | None, typer.Option("--steps", "--num-inference-steps", help="Denoising steps.", metavar="N")
]
CfgScale = Annotated[
    float | None,
    typer.Option(
        "--cfg-scale", "--guidance-scale", help="Strength of the prompt; 1 or 0 is no guidance.", metavar="X"
    ),
]
Sampler = Annotated[
    str | None,
    typer.Option(
        "--sampler",
        "--sampling-method",
        help="Such as euler, dpmpp_2m, 'DPM++ 2M SDE Karras', euler:s_churn=5; all: sdxl samplers.",
        metavar="NAME",
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Noise levels: auto, sgm, karras, karras:rho=5, ...; all: sdxl samplers.", metavar="NAME"
    ),
]
Sigmas = Annotated[
    str | None,
    typer.Option(
        help="Noise levels one by one, in place of a scheduler and steps.",
        metavar="14.6,...",
        rich_help_panel=STEPS,
    ),
]
Timesteps = Annotated[
    str | None,
    typer.Option(help="The same, as timesteps.", metavar="999,...", rich_help_panel=STEPS),
]
Eta = Annotated[
    float | None,
    typer.Option(
        help="Share of fresh noise, for samplers that add some; 0 is none.",
        metavar="X",
        rich_help_panel=STEPS,
    ),
]
SNoise = Annotated[
    float | None,
    typer.Option(help="How strong added noise is; 1 is right.", metavar="X", rich_help_panel=STEPS),
]
SChurn = Annotated[
    float | None,
    typer.Option(help="Noise added before steps: euler, heun, dpm2.", metavar="X", rich_help_panel=STEPS),
]
Seed = Annotated[int | None, typer.Option("--seed", "-s", help="First seed; -1 draws one.", metavar="N")]

OriginalSize = Annotated[
    str | None,
    typer.Option(
        help="Size before resizing; default: the output size.", metavar="WxH", rich_help_panel=CONDITIONS
    ),
]
CropTopLeft = Annotated[
    str | None,
    typer.Option(help="Pixels cut off above and left.", metavar="TOP,LEFT", rich_help_panel=CONDITIONS),
]
TargetSize = Annotated[
    str | None,
    typer.Option(help="Size aimed at; default: the output size.", metavar="WxH", rich_help_panel=CONDITIONS),
]
AestheticScore = Annotated[
    float | None,
    typer.Option(help="For the refiner, about 1 to 10.", metavar="X", rich_help_panel=CONDITIONS),
]
NegativeOriginalSize = Annotated[
    str | None,
    typer.Option(help="The same, for the negative side.", metavar="WxH", rich_help_panel=CONDITIONS),
]
NegativeCropTopLeft = Annotated[
    str | None,
    typer.Option(help="The same, for the negative side.", metavar="TOP,LEFT", rich_help_panel=CONDITIONS),
]
NegativeTargetSize = Annotated[
    str | None,
    typer.Option(help="The same, for the negative side.", metavar="WxH", rich_help_panel=CONDITIONS),
]
NegativeAestheticScore = Annotated[
    float | None,
    typer.Option(help="The same, for the negative side.", metavar="X", rich_help_panel=CONDITIONS),
]

Device = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.", metavar="NAME", rich_help_panel=MACHINE)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", "--precision", help="auto, fp32, bf16 or fp16.", metavar="NAME", rich_help_panel=MACHINE
    ),
]
VaeDtype = Annotated[
    str | None,
    typer.Option(
        help="Of the autoencoder: auto (fp32), bf16 or fp16.", metavar="NAME", rich_help_panel=MACHINE
    ),
]

Vram = Annotated[
    str | None,
    typer.Option(
        help="What stays loaded: high all, med one part at a time, low of the U-Net one block; or auto.",
        metavar="NAME",
        rich_help_panel=MACHINE,
    ),
]
VaeTiling = Annotated[
    bool | None,
    typer.Option(
        "--vae-tiling/--no-vae-tiling",
        help="Autoencoder in overlapping tiles: less memory; it is tried by itself when memory runs out.",
        rich_help_panel=MACHINE,
    ),
]
Prepack = Annotated[
    str | None,
    typer.Option(
        help="On a CPU, linear layers laid out as it multiplies them: on, off, or auto where that is faster.",
        metavar="WHEN",
        rich_help_panel=MACHINE,
    ),
]
CudaGraphs = Annotated[
    bool | None,
    typer.Option(
        "--cuda-graphs/--no-cuda-graphs",
        help="On a GPU, record the first step of each size and replay it.",
        rich_help_panel=MACHINE,
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Let torch compile the U-Net's blocks: minutes at first, for a little at each step.",
        rich_help_panel=MACHINE,
    ),
]
Winograd = Annotated[
    bool | None,
    typer.Option(
        "--winograd/--no-winograd",
        help="On a CPU, convolutions with fewer multiplications: the same but for rounding, and faster.",
        rich_help_panel=MACHINE,
    ),
]

Output = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        help="A folder, or a .png, .jpg or .webp file; default: outputs/.",
        metavar="PATH",
        rich_help_panel=OUTPUT,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace the --output file if it is there.", rich_help_panel=OUTPUT),
]
NoMetadata = Annotated[
    bool,
    typer.Option(
        "--no-metadata", help="Do not write into the picture how it was made.", rich_help_panel=OUTPUT
    ),
]


def flags_of(request: type[Any], given: Mapping[str, object]) -> dict[str, object]:
    """Those of a command's arguments that are fields of its request, by name; None is "not given"."""
    return {field.name: given[field.name] for field in dataclasses.fields(request) if field.name in given}
