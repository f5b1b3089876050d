"""The web page and JSON API of `retrieve serve`."""
