"""VPD of what training changed: differences between stages as the matrices to decompose."""
