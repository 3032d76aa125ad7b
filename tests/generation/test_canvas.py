"""Pictures to start from: how they are brought to size, masked, extended, and put together again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn import functional

from sdxl_cli.errors import UsageError
from sdxl_cli.generation.canvas import Canvas, around, fitted, open_canvas, parse_margins
from sdxl_cli.generation.mask import blend, feather, read_mask, to_latent
from sdxl_cli.generation.request import GenerateRequest, ResizeMode
from sdxl_cli.generation.sizes import Size

REQUEST = GenerateRequest(prompt="x", init_img="photo.png")
PHOTO = np.random.default_rng(1).integers(0, 256, (50, 70, 3), np.uint8)


def opened(request: GenerateRequest, size: Size | None = None) -> Canvas:
    Image.fromarray(PHOTO).save("photo.png")
    canvas = open_canvas(request, multiple=8, native=(64, 64), size=size)
    assert canvas is not None
    return canvas


def saved_mask(top: int, left: int, bottom: int, right: int) -> None:
    mask = np.zeros(PHOTO.shape[:2], np.uint8)
    mask[top:bottom, left:right] = 255
    Image.fromarray(mask).save("mask.png")


def another(canvas: Canvas) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, canvas.pixels.shape, np.uint8)


def test_a_picture_keeps_its_size_whatever_the_model_needs() -> None:
    canvas = opened(REQUEST)
    assert canvas.size == (56, 72)
    assert np.array_equal(canvas.pixels[:50, :70], PHOTO)
    assert (canvas.pixels[50:, :70] == PHOTO[-1]).all(), "filled up with the last row"
    made = another(canvas)
    assert np.array_equal(canvas.finish(made), made[:50, :70])


def test_nothing_to_start_from_is_no_canvas() -> None:
    assert open_canvas(GenerateRequest(prompt="x"), multiple=8, native=(64, 64), size=None) is None


@pytest.mark.parametrize(
    ("mode", "size"), [("crop", (40, 40)), ("pad", (40, 40)), ("stretch", (40, 40)), ("fit", (29, 40))]
)
def test_each_resize_mode_does_what_it_says(mode: ResizeMode, size: Size) -> None:
    """Of a 2:1 picture, red on the left and blue on the right, a square."""
    wide = np.zeros((100, 140, 3), np.uint8)
    wide[:, :70, 0] = wide[:, 70:, 2] = 255
    made = fitted(wide, (40, 40), mode, (0, 255, 0))
    assert made.shape[:2] == size
    left, right = made[size[0] // 2, 2], made[size[0] // 2, -3]
    assert (tuple(left), tuple(right)) == ((255, 0, 0), (0, 0, 255))
    green = (made[..., 1] == 255).mean()
    assert green == pytest.approx(1 - 29 / 40 if mode == "pad" else 0, abs=0.03)


def test_crop_is_even_and_masks_go_along() -> None:
    saved_mask(0, 0, 50, 35)
    canvas = opened(replace(REQUEST, mask="mask.png", mask_blur=0), (48, 48))
    expected = ImageOps.fit(Image.fromarray(PHOTO), (48, 48), Image.Resampling.LANCZOS)
    assert np.array_equal(canvas.pixels, np.asarray(expected))
    assert canvas.repaint is not None
    assert canvas.repaint[:, :23].all()
    assert not canvas.repaint[:, 25:].any()


def test_the_camera_was_turned_and_transparency_has_a_colour() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(PHOTO).save("turned.png", exif=exif)
    canvas = open_canvas(replace(REQUEST, init_img="turned.png"), multiple=8, native=(64, 64), size=None)
    assert canvas is not None
    assert np.array_equal(canvas.picture, np.rot90(PHOTO, -1))
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save("clear.png")
    request = replace(REQUEST, init_img="clear.png", background="#102030")
    clear = open_canvas(request, multiple=8, native=(64, 64), size=None)
    assert clear is not None
    assert (clear.pixels == (16, 32, 48)).all()
    with pytest.raises(UsageError, match="--background bleu: expected a colour"):
        open_canvas(replace(request, background="bleu"), multiple=8, native=(64, 64), size=None)


@pytest.mark.parametrize("blur", [0, 1, 4, 40])
@pytest.mark.parametrize("only_masked", [False, True])
def test_pixels_outside_the_mask_are_untouched_and_those_inside_are_not(blur: int, only_masked: bool) -> None:
    saved_mask(11, 17, 31, 43)
    request = replace(REQUEST, mask="mask.png", mask_blur=blur, only_masked=only_masked, mask_padding=5)
    canvas = opened(request)
    result = canvas.finish(another(canvas))
    outside = np.ones(PHOTO.shape[:2], bool)
    outside[11:31, 17:43] = False
    assert np.array_equal(result[outside], PHOTO[outside])
    assert (result[~outside] != PHOTO[~outside]).any(axis=1).mean() > 0.9
    inverted = opened(replace(request, invert_mask=True, only_masked=False))
    turned = inverted.finish(another(inverted))
    assert np.array_equal(turned[~outside], PHOTO[~outside])
    assert (turned[outside] != PHOTO[outside]).any(axis=1).mean() > 0.9


def test_the_edge_fades_in_evenly_inside_the_mask_only() -> None:
    mask = np.zeros((40, 40), bool)
    mask[10:30, 5:35] = True
    share = feather(mask, 4)
    assert share[20, 4:11].tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1])
    assert np.array_equal(share > 0, mask)
    assert np.array_equal(feather(mask, 0), mask)
    mask[:, :5] = True
    assert feather(mask, 4)[20, 0] == 1, "the picture's own edge is none of the mask's"
    thin = np.zeros((40, 40), bool)
    thin[20:23] = True
    assert feather(thin, 16).max() == 1, "what is thin is repainted all the same"


def test_a_latent_with_a_single_pixel_to_repaint_is_repainted() -> None:
    mask = np.zeros((32, 48), bool)
    mask[9, 17] = mask[31, 47] = True
    expected = functional.max_pool2d(torch.from_numpy(mask)[None, None].float(), 8)
    assert torch.equal(to_latent(mask, 8), expected)


def test_masks_are_cut_at_half_and_scaled_only_when_they_have_the_pictures_shape() -> None:
    levels = np.full((50, 70), 9, np.uint8)  # as a JPEG makes of black
    levels[:25, :35] = 200
    Image.fromarray(levels).resize((140, 100), Image.Resampling.NEAREST).save("mask.png")
    mask = read_mask(Path("mask.png"), (50, 70))
    assert np.array_equal(mask, levels > 100)
    with pytest.raises(UsageError, match=r"mask.png: is 140x100, the picture 50x70; draw it"):
        read_mask(Path("mask.png"), (70, 50))
    Image.new("L", (70, 50)).save("black.png")
    with pytest.raises(UsageError, match="nothing in it is white"):
        read_mask(Path("black.png"), (50, 70))
    Image.new("RGBA", (70, 50), (255, 255, 255, 0)).save("clear.png")
    with pytest.raises(UsageError, match="nothing in it is white"):
        read_mask(Path("clear.png"), (50, 70))


def test_outpainting_keeps_every_old_pixel_and_begins_with_the_nearest_colours() -> None:
    canvas = opened(replace(REQUEST, outpaint="3,10,21,0"))
    assert canvas.result_size == (60, 94)
    assert canvas.size == (64, 96)
    assert (canvas.pixels[10:60, :3] == PHOTO[:, :1]).all()
    assert (canvas.pixels[:10, 3:73] == PHOTO[:1]).all()
    result = canvas.finish(another(canvas))
    assert np.array_equal(result[10:60, 3:73], PHOTO)
    assert (result[:10] != canvas.picture[:10]).any(axis=2).mean() > 0.9
    saved_mask(0, 0, 5, 5)
    both = opened(replace(REQUEST, outpaint="8,0,0,0", mask="mask.png", mask_blur=0))
    assert both.repaint is not None
    assert both.repaint[:50, :78].sum() == 8 * 50 + 5 * 5


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", "-8,0,0,8", "0,0,0,0"])
def test_margins_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="expected the pixels to add as LEFT,TOP,RIGHT,BOTTOM"):
        parse_margins(text)


def test_the_window_around_a_mask_has_the_working_shape_and_stays_inside() -> None:
    whole = (0, 0, 300, 400)
    assert around((100, 200, 140, 220), 10, whole, None) == (90, 190, 150, 230)
    assert around((100, 200, 140, 220), 10, whole, (64, 128)) == (90, 150, 150, 270)
    assert around((0, 380, 40, 400), 10, whole, (128, 128)) == (0, 350, 50, 400)
    assert around((0, 0, 300, 400), 10, whole, (128, 128)) == whole


def test_only_masked_works_on_the_models_own_area() -> None:
    saved_mask(11, 17, 31, 43)
    canvas = opened(replace(REQUEST, mask="mask.png", only_masked=True, mask_padding=5))
    assert canvas.window == (6, 12, 36, 48)
    assert canvas.shown[0] * canvas.shown[1] == pytest.approx(64 * 64, rel=0.03)
    assert canvas.shown[1] / canvas.shown[0] == pytest.approx(36 / 30, rel=0.03)
    sized = opened(replace(REQUEST, mask="mask.png", only_masked=True, mask_padding=5), (128, 128))
    assert sized.size == (128, 128)
    assert sized.window == (3, 12, 39, 48)


def test_a_shift_of_colour_is_no_seam() -> None:
    """What an autoencoder shifts everywhere is taken off at the edge, and left alone far inside."""
    old = np.full((200, 200, 3), (90, 120, 150), np.uint8)
    share = np.zeros((200, 200), np.float32)
    share[:, 100:] = 1
    result = blend(old + np.uint8(20), old, share, reach=8.0).astype(int)
    assert np.array_equal(result[:, :100], old[:, :100])
    row = result[100, :, 0] - 90
    assert abs(row[100]) <= 1
    assert (np.diff(row[100:]) >= 0).all()
    assert np.diff(row).max() <= 2
    assert row[130] == 20


def test_flags_that_say_nothing_without_another_are_refused() -> None:
    for values, words in (
        ({"strength": 0.5}, "strength has no meaning without init_img"),
        ({"mask": "m.png"}, "mask has no meaning without init_img"),
        ({"outpaint": "1,1,1,1"}, "outpaint has no meaning without init_img"),
        ({"init_img": "a.png", "only_masked": True}, "only_masked has no meaning without mask"),
        (
            {"init_img": "a.png", "mask": "m.png", "only_masked": True, "outpaint": "8,8,8,8"},
            "only_masked and outpaint do not go together",
        ),
        ({"init_img": "a.png", "strength": 0.0}, "strength 0.0: must be above 0"),
        ({"init_img": "a.png", "mask_blur": -1}, "mask_blur -1"),
    ):
        with pytest.raises(ValueError, match=words):
            GenerateRequest(prompt="x", **values)  # type: ignore[arg-type]
