"""Programs that stand beside an exported model, and work without cxrscale."""
