"""How fast a machine is at each part of the work, how much memory that takes, and how far it is from what it can do."""
