"""The CogVideoX model, one file a part."""
