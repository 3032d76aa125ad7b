"""The flags of ``generate`` about pictures to start from, and about what follows the first pass."""

from __future__ import annotations

from typing import Annotated

import typer

from sdxl_cli.commands._sampling import MODEL

CANVAS, HIRES = "Picture to start from", "A second, larger pass"

InitImg = Annotated[
    str | None,
    typer.Option(
        "--init-img",
        "--image",
        "-i",
        help="Start from this picture instead of noise.",
        metavar="PICTURE",
        rich_help_panel=CANVAS,
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        "--strength",
        "--denoising-strength",
        "--denoise",
        help="How much of it changes, 0 to 1; default: 0.75, with --outpaint 1.",
        metavar="X",
        rich_help_panel=CANVAS,
    ),
]
ExactSteps = Annotated[
    bool | None,
    typer.Option(
        "--exact-steps/--no-exact-steps",
        help="Run all --steps, whatever the strength.",
        rich_help_panel=CANVAS,
    ),
]
ResizeMode = Annotated[
    str | None,
    typer.Option(
        help="How it is brought to --size: crop, pad, stretch or fit; default: crop.",
        metavar="MODE",
        rich_help_panel=CANVAS,
    ),
]
Background = Annotated[
    str | None,
    typer.Option(
        help="Colour behind its transparent parts, and around it with pad.",
        metavar="COLOUR",
        rich_help_panel=CANVAS,
    ),
]
Mask = Annotated[
    str | None,
    typer.Option(
        "--mask",
        "--mask-image",
        help="Repaint only what is white here.",
        metavar="PICTURE",
        rich_help_panel=CANVAS,
    ),
]
InvertMask = Annotated[
    bool | None,
    typer.Option(
        "--invert-mask/--no-invert-mask", help="Repaint what is black instead.", rich_help_panel=CANVAS
    ),
]
MaskBlur = Annotated[
    int | None,
    typer.Option(
        help="Fade in over so many pixels inside the mask's edge.", metavar="PIXELS", rich_help_panel=CANVAS
    ),
]
MaskContent = Annotated[
    str | None,
    typer.Option(
        help="What is under the mask at first: original or noise.", metavar="NAME", rich_help_panel=CANVAS
    ),
]
OnlyMasked = Annotated[
    bool | None,
    typer.Option(
        "--only-masked/--whole-picture",
        help="Enlarge the masked part to --size, repaint it, put it back.",
        rich_help_panel=CANVAS,
    ),
]
MaskPadding = Annotated[
    int | None,
    typer.Option(
        help="Pixels around it that --only-masked shows the model.", metavar="PIXELS", rich_help_panel=CANVAS
    ),
]
Outpaint = Annotated[
    str | None,
    typer.Option(
        help="Pixels to paint around the picture: LEFT,TOP,RIGHT,BOTTOM.",
        metavar="L,T,R,B",
        rich_help_panel=CANVAS,
    ),
]

HiresScale = Annotated[
    float | None,
    typer.Option(help="Times larger per side, such as 1.5 or 2.", metavar="X", rich_help_panel=HIRES),
]
HiresSteps = Annotated[
    int | None, typer.Option(help="Steps that it runs; default: --steps.", metavar="N", rich_help_panel=HIRES)
]
HiresStrength = Annotated[
    float | None,
    typer.Option(
        "--hires-denoising-strength",
        "--hires-strength",
        help="How much it changes, 0 to 1.",
        metavar="X",
        rich_help_panel=HIRES,
    ),
]
HiresUpscaler = Annotated[
    str | None,
    typer.Option(help="latent, or lanczos, which decodes in between.", metavar="NAME", rich_help_panel=HIRES),
]

RefinerMode = Annotated[
    str | None,
    typer.Option(
        help="ensemble: continues where the base stops; sdedit: goes over what the base finished.",
        metavar="NAME",
        rich_help_panel=MODEL,
    ),
]
RefinerStrength = Annotated[
    float | None,
    typer.Option(
        help="With sdedit, how much it changes, 0 to 1; default: 0.3.", metavar="X", rich_help_panel=MODEL
    ),
]
