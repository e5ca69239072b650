"""From a gigapixel pathology slide to every nucleus: outlined, typed and measured, ready for QuPath."""

__version__ = "0.1.0"
