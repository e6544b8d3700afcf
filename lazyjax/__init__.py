"""lazyjax: does this network train like its linearization?"""

__all__ = []
