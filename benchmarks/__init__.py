"""The helpers' speed, against what people would otherwise use: ``make benchmark``."""
