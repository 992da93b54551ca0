"""Scaled covariance as tiles or as a factor."""
