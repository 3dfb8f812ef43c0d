"""mlx-lm's adapter folders."""
