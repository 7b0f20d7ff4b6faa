"""Make the next round of an experiment from what people gave since the last one."""
