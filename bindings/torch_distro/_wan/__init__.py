"""An internet of network namespaces on one machine, and what training over it costs."""
