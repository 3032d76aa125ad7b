"""What ``sdxl eval`` does: whole sets of pictures measured, so that a run that was stopped goes on."""
