"""The report as an HTML page: the public path of `fxzip.views.page`."""

from fxzip.views.page import fragment, write_page

__all__ = ["fragment", "write_page"]
