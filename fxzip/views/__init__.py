"""Views of a merged network: its outline by layers, drawings, the HTML page."""
