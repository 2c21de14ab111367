"""Claims, the rules that judge them, and inference from few seeds."""
