"""The compiled library, once for each instruction set: ``fastnas/_ext.py`` loads the one for the processor."""
