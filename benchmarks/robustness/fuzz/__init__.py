"""Throw damaged and hostile files at every reader, and say which of them get anything but an InputError."""
