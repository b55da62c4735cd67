"""The machine under the model: files, devices and compilation."""
