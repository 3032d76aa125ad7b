"""The networks of SDXL: torch modules and nothing else."""
