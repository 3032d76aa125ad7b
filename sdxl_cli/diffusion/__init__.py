"""The mathematics of noise, without networks: schedules, denoisers, guidance, samplers."""
