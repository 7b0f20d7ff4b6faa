"""How policies are asked, compared and judged, and with which intervals."""
