"""The ComfyUI node: against a stand-in for ComfyUI's executor, and in ComfyUI itself where a checkout is given."""
