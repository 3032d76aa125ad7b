"""The paper's figures as commands: what a model does when one condition changes and nothing else."""
