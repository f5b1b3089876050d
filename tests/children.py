"""What the processes that tests start have in common."""

# A shell that starts the suite in the background (`nohup make test &`) lets it ignore Ctrl-C, and
# children inherit that.
HEARS_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
