"""Polynomials through the past, which linear multistep methods integrate over the next step."""

from __future__ import annotations

from numpy.polynomial import Polynomial


def lagrange(nodes: list[float]) -> list[Polynomial]:
    """For each node the polynomial that is 1 there and 0 at the others."""
    bases = []
    for j, node in enumerate(nodes):
        basis = Polynomial([1.0])
        for other in nodes[:j] + nodes[j + 1 :]:
            basis = basis * Polynomial([-other, 1.0]) / (node - other)
        bases.append(basis)
    return bases
