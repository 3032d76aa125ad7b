"""Samplers: a file each, registered by being listed here."""

from __future__ import annotations

from sdxl_cli.diffusion.samplers.base import Sampler
from sdxl_cli.diffusion.samplers.deis import DEIS
from sdxl_cli.diffusion.samplers.dpm2 import DPM2
from sdxl_cli.diffusion.samplers.dpm2_a import DPM2Ancestral
from sdxl_cli.diffusion.samplers.dpmpp_2m import DPMpp2M
from sdxl_cli.diffusion.samplers.dpmpp_2m_sde import DPMpp2MSDE
from sdxl_cli.diffusion.samplers.dpmpp_2s_a import DPMpp2SAncestral
from sdxl_cli.diffusion.samplers.dpmpp_3m_sde import DPMpp3MSDE
from sdxl_cli.diffusion.samplers.dpmpp_sde import DPMppSDE
from sdxl_cli.diffusion.samplers.euler import Euler
from sdxl_cli.diffusion.samplers.euler_a import EulerAncestral
from sdxl_cli.diffusion.samplers.heun import Heun
from sdxl_cli.diffusion.samplers.lcm import LCM
from sdxl_cli.diffusion.samplers.lms import LMS
from sdxl_cli.diffusion.samplers.tcd import TCD
from sdxl_cli.diffusion.samplers.unipc import UniPC

SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Euler(),
        EulerAncestral(),
        Heun(),
        DPM2(),
        DPM2Ancestral(),
        LMS(),
        DPMpp2M(),
        DPMpp2MSDE(),
        DPMpp2MSDE(name="dpmpp_2m_sde_heun", label="DPM++ 2M SDE Heun", solver_type="heun"),
        DPMpp3MSDE(),
        DPMpp3MSDE(name="dpmpp_3m", label="DPM++ 3M", grid="karras", eta=0.0),
        DPMppSDE(),
        DPMpp2SAncestral(),
        EulerAncestral(name="ddim", label="DDIM", eta=0.0),
        EulerAncestral(name="ddpm", label="DDPM"),
        UniPC(),
        DEIS(),
        LCM(),
        TCD(),
    )
}
"""Samplers by name, as ``--sampler`` takes them, with their usual options."""
