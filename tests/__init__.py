"""What the tests share. A package of that name, such as torch-fidelity brings, would go before a mere folder."""
