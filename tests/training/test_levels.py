"""Which noise levels are drawn, what they weigh, and where their errors are reported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from sdxl_cli.diffusion.schedule import sigma_table
from sdxl_cli.errors import UsageError
from sdxl_cli.training.levels import Drawing
from sdxl_cli.training.losses import add_noise, by_level, debiased_weight, level_weight
from sdxl_cli.training.metrics import Mean, merged, summed_images
from tests.training.small import unet_config


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("scheme", ["logit_normal", "mode"])
def test_densities_are_those_of_diffusers(scheme: Any) -> None:
    config = unet_config(timestep_sampling=scheme, logit_mean=0.3, logit_std=0.8, mode_scale=1.1)
    ours = Drawing(config).draw(500, seeded())
    theirs = compute_density_for_timestep_sampling(
        scheme, 500, logit_mean=0.3, logit_std=0.8, mode_scale=1.1, generator=seeded()
    )
    assert ours.index.tolist() == (theirs * 1000).long().clamp(0, 999).tolist()
    torch.testing.assert_close(ours.sigma, sigma_table()[ours.index])
    assert torch.equal(ours.time, ours.index)


@pytest.mark.parametrize("scheme", ["uniform", "logit_normal", "mode"])
def test_levels_keep_to_their_range(scheme: Any) -> None:
    config = unet_config(timestep_sampling=scheme, timestep_min=50, timestep_max=199)
    index = Drawing(config).draw(5000, seeded()).index
    ends = (int(index.min()), int(index.max()))
    assert ends == (50, 199) if scheme != "logit_normal" else 50 <= ends[0] < 60 and 190 < ends[1] <= 199


def test_spread_levels_cover_the_range_evenly() -> None:
    config = unet_config(timestep_min=100, timestep_max=199)
    assert Drawing(config).spread(torch.tensor([0.05, 0.5, 0.95, 1.0])).index.tolist() == [105, 150, 195, 199]


EDM = {"objective": "edm", "prediction": "v", "min_snr_gamma": 0.0}


def test_edm_levels_are_log_normal_and_told_as_a_quarter_of_the_logarithm() -> None:
    levels = Drawing(unet_config(**EDM, edm_mean=-0.4, edm_std=1.1)).draw(20000, seeded())
    logs = levels.sigma.log()
    assert float(logs.mean()) == pytest.approx(-0.4, abs=0.03)
    assert float(logs.std()) == pytest.approx(1.1, abs=0.03)
    torch.testing.assert_close(levels.time, logs / 4, rtol=1e-5, atol=1e-6)
    inner = (levels.sigma > 0.5) & (levels.sigma < 10)
    torch.testing.assert_close(sigma_table()[levels.index][inner], levels.sigma[inner], rtol=0.01, atol=0)


def edm_pair() -> tuple[Tensor, Tensor, Tensor]:
    latent, noise, output = torch.randn(3, 4, 4, 6, 6, generator=seeded(5))
    return latent, noise, output


def test_edm_preconditioning_is_that_of_diffusers() -> None:
    """Karras et al., table 1, for data of deviation 1 and a network that says v."""
    latent, noise, _ = edm_pair()
    peer = EDMEulerScheduler(sigma_data=1.0, prediction_type="v_prediction")
    sigma = torch.tensor([0.05, 0.7, 3.0, 40.0])
    noised = add_noise(latent, noise, sigma, "v", 0.0)
    for i, level in enumerate(sigma):
        x = latent[i] + level * noise[i]
        torch.testing.assert_close(noised.network_input[i], peer.precondition_inputs(x, level))
        # a network that says the target is one whose output, preconditioned, is the clean latent
        clean = peer.precondition_outputs(x, noised.target[i], level)
        torch.testing.assert_close(clean, latent[i], rtol=1e-3, atol=1e-3)


def test_the_edm_loss_is_the_papers_weighted_distance_of_denoised_latents() -> None:
    """lambda = (sigma² + 1) / sigma² (table 1, sigma_data 1): the mean square of v, sample by sample."""
    latent, noise, output = (t.double() for t in edm_pair())
    sigma = torch.tensor([0.05, 0.7, 3.0, 40.0], dtype=torch.float64)
    noised = add_noise(latent, noise, sigma, "v", 0.0)
    level = sigma.view(-1, 1, 1, 1)
    c_skip, c_out = 1 / (level**2 + 1), -level / (level**2 + 1).sqrt()
    denoised = c_skip * (latent + level * noise) + c_out * output
    expected = ((level**2 + 1) / level**2 * (denoised - latent) ** 2).mean((1, 2, 3))
    ours = (noised.weight.view(-1, 1, 1, 1) * (output - noised.target) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "values",
    [
        {"objective": "edm"},
        {"objective": "edm", "prediction": "v", "zero_terminal_snr": True},
        {"objective": "edm", "prediction": "v", "timestep_max": 199},
        {"debiased": True},
        {"debiased": True, "prediction": "v", "min_snr_gamma": 0.0},
        {"level_weights": (1.0, -1.0)},
        {"level_weights": (0.0, 0.0)},
        {"dropout": {"clip": 0.1}},
        {"dropout": {"clip_l": 1.1}},
        {"dropout": {"clip_l": 0.1}, "text_dropout_mode": "joint"},
        {"logit_std": 0.0},
    ],
)
def test_objectives_that_make_no_sense_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        unet_config(**values)


def test_debiased_weights_are_the_root_of_noise_over_signal() -> None:
    sigma = sigma_table()[[0, 500, 999]]
    snr = 1 / sigma.square()
    torch.testing.assert_close(debiased_weight(sigma), snr.rsqrt())


def test_level_weights_belong_to_equal_parts() -> None:
    index = torch.tensor([0, 249, 250, 749, 750, 999])
    assert level_weight((1.0, 2.0, 3.0, 0.5), index).tolist() == [1, 1, 2, 3, 0.5, 0.5]
    assert level_weight((), index).tolist() == [1.0] * 6


def test_errors_are_reported_by_tenths_of_the_levels() -> None:
    found = by_level(torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([0, 99, 100, 999]))
    assert found == {"mse_000_099": 2.0, "mse_100_199": 5.0, "mse_900_999": 7.0}
    assert [mean.count for mean in found.values() if isinstance(mean, Mean)] == [2, 1, 1]


def test_means_are_merged_by_what_they_stand_for() -> None:
    rows = [{"a": Mean(1.0, 3), "images": 3.0}, {"a": Mean(5.0, 1), "b": 2.0, "images": 1.0}]
    assert merged(rows) == {"a": 2.0, "images": 2.0, "b": 2.0}
    assert summed_images(rows) == {"a": 2.0, "images": 4.0, "b": 2.0}
    again = merged([merged(rows), {"a": Mean(10.0, 4)}])
    assert again["a"] == 6.0
